"""Where a run stands: what its phase holds, its account, and what can be read of both."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn
from typing_extensions import Self

from deepclean_hooks.guard.guard import NormStatistics
from deepclean_hooks.measure.request import Measured
from deepclean_hooks.methods.method import Mask, Method, Selection
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks import fsdp, shards
from deepclean_hooks.report.report import Report
from deepclean_hooks.run.account import Account
from deepclean_hooks.run.phases import (
    Closed,
    Failed,
    Finished,
    Guarded,
    New,
    Phase,
    WasMeasured,
    WasReset,
    WasSelected,
)
from deepclean_hooks.run.resuming import packed
from deepclean_hooks.stored import checkpoint

P = TypeVar("P", bound=Phase)


class Standing:
    """A run in one of its phases; only a session takes it to the next."""

    def __init__(self, model: nn.Module, method: Method, norm_statistics: NormStatistics) -> None:
        self.model, self.method = model, method
        self.norm_statistics: NormStatistics = norm_statistics
        self._at: Phase = New()
        self._account = Account(
            Report(
                method.name,
                method.settings(),
                self._at.name,
                trainable_entries=sum(p.numel() for p in self._trainable().values()),
                norm_statistics=norm_statistics,
            )
        )

    @property
    def report(self) -> Report:
        """The account so far; fields of phases that have not happened are None."""
        return self._account.report

    @property
    def measured(self) -> Measured:
        """The measurements; raises RuntimeError before `measure` and once they have served."""
        if isinstance(self._at, WasMeasured | WasSelected):
            return self._at.measured
        raise RuntimeError("there are measurements between measure() and reset() only")

    @property
    def selection(self) -> Selection:
        """What the method picked; raises RuntimeError before `select`, and in a resumed run."""
        at = self._at if isinstance(self._at, WasSelected) else self._reset()
        if at is None or at.selection is None:
            raise RuntimeError("there is no selection before select(), and none in a resumed run")
        return at.selection

    @property
    def free(self) -> Mask:
        """The entries that may train after the reset; empty before `select`."""
        at = self._at if isinstance(self._at, WasSelected) else self._reset()
        return {} if at is None else at.free

    @property
    def trains(self) -> bool:
        """Whether any entry may train after the reset."""
        return any([shards.any_true(mask) for mask in self.free.values()])

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on after the reset, beside the model's and the optimizer's own
        state, both of which must be stored at the same moment.

        Tensors, numbers and strings only, so that torch.load(weights_only=True) reads it back. The
        masks are whole, at one bit an entry, also of a sharded model, where all ranks call this.
        """
        at = self._reset()
        if at is None:
            raise RuntimeError(
                f"a session can be stored from the reset on, this one is {self._at.name!r}; "
                "before the reset nothing has happened that could not be done again"
            )
        return {**packed(at, self.method, self.report), **self.so_far()}

    def so_far(self) -> dict[str, Any]:
        """What of `state_dict()` changes while your loop runs: `steps` (of optimizers), `added`
        (those to which the method's term was added) and `seconds` (by phase), those before a resume
        included, and `model`, the digest of the model as it is now."""
        at = self._reset()
        return {
            "steps": 0 if at is None else at.steps,
            "added": 0 if at is None else at.added,
            "seconds": self._seconds(),
            "model": checkpoint.model_digest(self.model),
        }

    def refresh(self, average: object) -> Self:
        """Writes the model's weights into an average of it (EMA, SWA) from before the reset, which
        then begins anew: without this it keeps what is to be forgotten.

        `average`: torch's AveragedModel, timm's ModelEma, V2 or V3, a plain copy, or an object with
        a module, a list or a dict of tensors like the model's. Raises ValueError for anything else.
        """
        self._expect(Guarded, "refresh").guard.refresh(average)
        return self

    def compact(self) -> dict[str, nn.Parameter]:
        """The free entries as small tensors by parameter name, to build an optimizer of your own
        on.

        What it remembers then has the size of W_f. `Guard.compact` says what it serves.
        """
        return self._expect(Guarded, "compact").guard.compact()

    def hold(self) -> Self:
        """Puts every frozen entry back to its bits now; call it after an average of the weights
        (EMA, SWA) was written into the model, for averaging rounds entries that are equal."""
        self._expect(Guarded, "hold").guard.hold()
        return self

    def close(self) -> None:
        """Takes every hook off the model and the optimizers; safe at any time, and twice."""
        if isinstance(self._at, Guarded):
            now, seconds = self._at.so_far(), self._seconds()
            self._at.guard.release()
            self._account.report = replace(self.report, seconds=seconds)
            self._at = Closed(now)

    # ------------------------------------------------------------------ inside

    def _expect(self, phase: type[P], call: str) -> P:
        if isinstance(self._at, Failed):
            raise RuntimeError(
                f"{call}() needs a session that is {phase.name!r}; the finish() of this one has "
                "raised, which stands: load the original weights and begin anew in a new Session"
            )
        if not isinstance(self._at, phase):
            raise RuntimeError(
                f"{call}() needs a session that is {phase.name!r}, this one is {self._phase!r}; "
                "the order is measure -> select -> reset -> guard -> your loop -> finish, each once"
            )
        return self._at

    @property
    def _phase(self) -> str:
        return self._at.name

    def _enter(self, phase: Phase) -> None:
        self._at = phase
        self._account.report = replace(self.report, phase=phase.name)

    def _reset(self) -> WasReset | None:
        """What it takes to go on, once there is something to go on with."""
        if isinstance(self._at, Guarded):
            return self._at.so_far()
        if isinstance(self._at, Closed | Finished):
            return self._at.reset
        return self._at if isinstance(self._at, WasReset) else None

    def _parameters(self) -> dict[str, Tensor]:
        return dict(fsdp.parameters_of(unwrap(self.model)))

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._parameters().items() if p.requires_grad}

    def _seconds(self) -> dict[str, float]:
        """By phase so far, those before a resume included."""
        seconds = dict(self.report.seconds)
        if isinstance(self._at, Guarded):
            spent = time.perf_counter() - self._at.started
            seconds["fine-tune"] = seconds.get("fine-tune", 0.0) + spent
        return seconds
