"""No entry moves but the free ones, bit for bit, whatever optimizer steps the model.

Two halves, each needed: gradients of frozen entries are set to 0 during the backward pass, so that
clipping and closures see only what may train; and frozen bits are put back after every step,
because weight decay, momentum from before, Muon, AdamP, SGDP, MADGRAD, Kron and ASGD move entries
whose gradient is 0.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.guard import account as accounts
from deepclean_hooks.guard import averages
from deepclean_hooks.guard import norm_statistics as statistics
from deepclean_hooks.guard import optimizers as kinds
from deepclean_hooks.guard.account import Account
from deepclean_hooks.guard.added import BeforeStep
from deepclean_hooks.guard.averages import Averages
from deepclean_hooks.guard.compact import Compact
from deepclean_hooks.guard.held import GuardError, Held, restore
from deepclean_hooks.guard.norm_statistics import NormStatistics
from deepclean_hooks.guard.steps import Steps
from deepclean_hooks.guard.unseen import UnseenWrites, refuse_writing_forwards
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks.fsdp import reshard
from deepclean_hooks.ranks.shards import local
from deepclean_hooks.stored.bits import bits

__all__ = ["Guard", "GuardError", "NormStatistics"]

_guarded: set[int] = set()  # id() of every parameter of an active guard, which keeps it alive
_claiming = threading.RLock()  # reentrant: a guard may be collected while it is held


class Guard:
    """Holds every entry of `model` but the free ones at its bits until `release()`.

    `free` maps a name of the unwrapped model's `named_parameters()` to a bool tensor of the
    parameter's shape, True where an entry may train; a parameter without a mask is wholly frozen,
    trainable or not. Names, shapes or dtypes that do not fit raise ValueError before anything is
    hooked, a second guard on a parameter RuntimeError.

    What an optimizer remembers of these parameters from before is deleted when it first steps, for
    it holds what is to be forgotten; `clear_optimizer_state=False` keeps it, for a resumed run.
    Those in `optimizers` are cleared at once: pass a schedule-free optimizer that has already
    stepped (its `train()` writes what it remembers into the parameters), and any optimizer whose
    `step` torch's hooks do not see.

    With `norm_statistics="freeze"` running means and variances are held too, by evaluating those
    layers in eval mode; compiled models compile anew when that begins and ends.

    `before_step`, if given, is called before each step of an optimizer of the model reads its
    gradients, and may add to them; what it adds is masked like the rest.

    The guard owns a copy of the tensors that have frozen entries, and 1 byte for each entry of
    those that are partly free. A guard that is garbage collected releases itself.
    """

    def __init__(
        self,
        model: nn.Module,
        free: Mapping[str, Tensor],
        *,
        norm_statistics: NormStatistics = "update",
        clear_optimizer_state: bool = True,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        before_step: BeforeStep | None = None,
    ) -> None:
        self._model = unwrap(model)
        parameters = dict(self._model.named_parameters())
        _require_masks_fit(parameters, free)
        statistics.require_choice(norm_statistics)
        require_holdable(self._model)
        optimizers = tuple(optimizers)
        kinds.require_readable(optimizers)
        self._undo = contextlib.ExitStack()
        self._release = weakref.finalize(self, self._undo.close)
        _claim(parameters, self._undo)
        try:
            self._held = _held(parameters, free)
            self._unseen = UnseenWrites(self._model, self._held)
            self._steps = Steps(
                parameters,
                self._held,
                self._unseen,
                clear_state=clear_optimizer_state,
                before_step=before_step,
            )
            self._trainable = {
                name: parameter
                for name, parameter in parameters.items()
                if id(parameter) not in self._held or self._held[id(parameter)].free is not None
            }
            self._then = accounts.checksums(self._trainable)
            self._averages: Averages | None = None
            norms = statistics.norms(self._model) if norm_statistics == "freeze" else {}
            self._statistics = statistics.StatisticsSnapshot(norms)
            self._hook(norms.values())
            for optimizer in optimizers:
                self._steps.meet(kinds.unwrapped(optimizer))
        except BaseException:
            self._release()
            raise

    @property
    def steps(self) -> int:
        """How many optimizer steps were seen that touched a parameter of the model."""
        return self._steps.count

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Removes all hooks and copies; the model stays as it is, but for a step that was aborted
        half-way: its frozen entries and gradients are put back. Safe to call twice."""
        self._release()
        self._trainable.clear()
        self._held.clear()

    def compact(self) -> dict[str, nn.Parameter]:
        """The free entries as 1-D leaves by parameter name, to build an optimizer of your own on.

        What it remembers then has the size of the free entries. During the backward pass their
        gradients go to the leaves, and those of the model become None: clip the leaves. After each
        step of an optimizer of the leaves the model has their values.

        Raises ValueError in more than one process and for sharded parameters, and at the first step
        of an optimizer that needs whole tensors (Muon, Adafactor, LAMB, ...); RuntimeError at the
        step of an optimizer of the model's own parameters.
        """
        if not self._release.alive:
            raise RuntimeError("this guard was released; call compact() before release()")
        if self._steps.compact is None:
            if ranks.world()[1] > 1:
                raise ValueError(
                    "compact() takes gradients before they are averaged over the "
                    f"{ranks.world()[1]} processes; build the optimizer on model.parameters(), "
                    "which the guard holds too"
                )
            named = dict(self._model.named_parameters())
            self._steps.use_compact(Compact(named, self._masks()))
        assert self._steps.compact is not None
        return dict(self._steps.compact.leaves)

    def _masks(self) -> dict[str, Tensor]:
        masks = {}
        for name, parameter in self._model.named_parameters():
            held = self._held.get(id(parameter))
            if held is None:
                masks[name] = torch.ones_like(parameter, dtype=torch.bool)
            elif held.free is not None:
                masks[name] = held.free != 0
        return masks

    def watch_averages(self, reset: Mapping[str, Tensor]) -> list[str]:
        """Looks for averages of the model (EMA, SWA) from before the reset; returns what a report
        has to say of them. `reset`: masks of the entries that were reset."""
        self._averages = Averages(self._model, reset)
        return self._averages.remarks()

    def refresh(self, average: object) -> None:
        """Writes the model's parameters into an average of it, which begins anew from there.

        Raises ValueError if nothing in the object has the shapes of the model's parameters.
        """
        refreshed = averages.refresh(average, self._model)
        if self._averages is not None:
            self._averages.refreshed(refreshed)

    def account(self) -> dict[str, Account]:
        """What became of the free entries, by name of each parameter that has any (this rank's
        shards). Raises RuntimeError after `release()`."""
        self._parameters_now()
        now = accounts.checksums(self._trainable)
        return {
            name: self._account_of(parameter, moved=now[name] != self._then[name])
            for name, parameter in self._trainable.items()
        }

    def _account_of(self, parameter: nn.Parameter, *, moved: bool) -> Account:
        held = self._held.get(id(parameter))
        zero = bits(local(parameter)) == 0
        free = None if held is None or held.free is None else held.free != 0
        return Account(
            free=zero.numel() if free is None else int(free.sum()),
            zero=int((zero if free is None else zero & free.to(zero.device)).sum()),
            moved=moved,
            owned=id(parameter) in self._steps.owned,
            reached=id(parameter) in self._steps.reached,
        )

    def remarks(self, reset: Mapping[str, int], *, steps: int | None = None) -> list[str]:
        """What a report has to say of reset entries that did not train, and of unseen writes.

        `reset`: how many entries of each parameter were reset, by name; `steps`: all optimizer
        steps of the run, if it is a resumed one. On several ranks all call this. Empty if there is
        nothing to say. Raises RuntimeError after `release()`.
        """
        before = 0 if steps is None else steps - self.steps
        said = accounts.remarks(self.account(), reset, seen=self.steps, before=before)
        copies = [] if self._averages is None else self._averages.moved()
        return [*filter(None, [self._unseen.remark()]), *said, *copies]

    def hold(self) -> None:
        """Puts every frozen entry and norm statistic back now: for weights that were written by
        something else than an optimizer, such as an average, which rounds equal values."""
        restore(self._held.values())
        self._statistics.put_back()

    def moved(self) -> dict[str, int]:
        """How many frozen entries of each parameter have moved, by name; only names with any.

        Counted bit by bit from when the guard was set. Compared with what the model has under each
        name now, so a parameter replaced by another object counts too, and all entries of a
        parameter that is gone. Frozen norm statistics count under their buffer names. Under FSDP2
        each rank counts its own shard. What was written outside the steps that can be seen, and
        noticed, is put back first. Raises RuntimeError after `release()`.
        """
        now = self._parameters_now()
        self._unseen.put_back()
        counts = {
            held.name: held.moved(now[held.name]) if held.name in now else held.count()
            for held in self._held.values()
        }
        counts = {name: count for name, count in counts.items() if count}
        return {**counts, **self._statistics.moved()}

    def check(self) -> None:
        """Raises GuardError if an entry moved or is no longer held: which, why and the way out."""
        counts, now = self.moved(), self._parameters_now()
        replaced = [
            held.name for held in self._held.values() if now.get(held.name) is not held.parameter
        ]
        problems = []
        if counts:
            listed = [f"{name} ({count})" for name, count in counts.items()]
            problems.append(f"{sum(counts.values())} frozen entries moved: {_some(listed)}")
        if replaced:
            problems.append(
                f"replaced by other objects since the guard was set: {_some(replaced)}; set the "
                "guard after what replaces them (fully_shard(), Accelerator.prepare(), setattr)"
            )
        if counts and self._steps.saw_gradient and not self.steps:
            problems.append(
                "gradients were computed but no optimizer step was seen: `step` is set on the "
                "optimizer's instance, or its class does not call torch.optim.Optimizer.__init__; "
                "pass it as Guard(..., optimizers=[optimizer])"
            )
        elif counts and not replaced:
            problems.append(
                "something wrote to them outside the steps that were seen: an optimizer whose "
                "`step` is set on the instance (pass it as Guard(..., optimizers=[optimizer])), "
                "gradients of torch.autograd.grad(), which no hook can mask, load_state_dict() or "
                "another write in place; after writing the weights by hand, or an average of them, "
                "which rounds, call hold()"
            )
        if problems:
            raise GuardError("; ".join(problems))

    def _parameters_now(self) -> dict[str, nn.Parameter]:
        if not self._release.alive:
            raise RuntimeError("this guard was released; ask it before release()")
        reshard(self._model)
        return dict(self._model.named_parameters())

    def _hook(self, norms: Collection[nn.Module]) -> None:
        self._undo.callback(self._unseen.close)
        self._undo.callback(self._steps.close)
        self._steps.begin()
        if norms:
            self._hook_norms(norms)

    def _hook_norms(self, norms: Collection[nn.Module]) -> None:
        statistics.forget_compiled()
        self._undo.callback(statistics.forget_compiled)
        quiet = statistics.EvalDuringForward()
        for module in norms:
            for handle in (
                module.register_forward_pre_hook(quiet.before),
                module.register_forward_hook(quiet.after, always_call=True),
            ):
                self._undo.callback(handle.remove)


def _held(parameters: Mapping[str, nn.Parameter], free: Mapping[str, Tensor]) -> dict[int, Held]:
    held = {}
    for name, parameter in parameters.items():
        mask = free.get(name)
        if mask is None or not bool(mask.all()):
            partly = mask is not None and bool(mask.any())
            held[id(parameter)] = Held(name, parameter, mask if partly else None)
    return held


def _claim(parameters: Mapping[str, nn.Parameter], undo: contextlib.ExitStack) -> None:
    """Takes the parameters for a guard until `undo` closes; RuntimeError if another has any."""
    claimed = list(parameters.values())
    with _claiming:
        _require_unguarded(parameters)
        _guarded.update(map(id, claimed))
    undo.callback(_unclaim, claimed)


def _unclaim(claimed: list[nn.Parameter]) -> None:
    with _claiming:
        _guarded.difference_update(map(id, claimed))


def _require_masks_fit(parameters: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> None:
    problems = [f"{name}: no such parameter" for name in free if name not in parameters]
    for name, parameter in parameters.items():
        mask = free.get(name)
        if mask is not None and mask.dtype != torch.bool:
            problems.append(f"{name}: {mask.dtype}, not torch.bool")
        if mask is not None and mask.shape != parameter.shape:
            problems.append(f"{name}: shape {tuple(mask.shape)}, not {tuple(parameter.shape)}")
        if parameter.element_size() > 8:
            problems.append(f"{name}: {parameter.dtype} has no integer type of its width")
    if problems:
        raise ValueError(
            "free must map names of model.named_parameters() (a tied parameter goes by its first "
            f"one) to bool tensors of their shapes: {'; '.join(problems)}"
        )


def require_holdable(model: nn.Module) -> None:
    """Raises RuntimeError if another guard holds a parameter of the model, ValueError for layers
    whose forward pass writes their weight."""
    _require_unguarded(dict(model.named_parameters()))
    refuse_writing_forwards(model)


def _require_unguarded(parameters: Mapping[str, Tensor]) -> None:
    taken = [name for name, parameter in parameters.items() if id(parameter) in _guarded]
    if taken:
        raise RuntimeError(
            f"already held by another guard: {_some(taken)}; call release() on that guard first, "
            "or leave its `with` block"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
