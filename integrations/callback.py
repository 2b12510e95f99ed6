"""What the callbacks of the Trainer and of Lightning share: the run, what is kept of it for the
next call, its checkpoints' entry, its report and figures."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import Unpack

from deepclean_hooks.data.samples import Data
from deepclean_hooks.integrations.beginning import begin, require_same_way, take_up
from deepclean_hooks.integrations.run_output import leave_report, write_report
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods import DEFAULT
from deepclean_hooks.methods.method import Method
from deepclean_hooks.metrics.scoring import scored
from deepclean_hooks.options import Options, require_known
from deepclean_hooks.report.report import Report
from deepclean_hooks.session import Session
from deepclean_hooks.stored import sealed


class UnlearningCallback:
    """One run of unlearning inside a training loop that tells its callbacks what happens."""

    _training = ""  # the call that the loop is begun by, for errors

    def __init__(
        self,
        forget: Data | None = None,
        *,
        method: Method | None = None,
        retain: Data | Measurement | None = None,
        folder: str | Path | None = None,
        **options: Unpack[Options],
    ) -> None:
        """`forget` may be left out of a run that is resumed; `method` is DeepClean() by default,
        one that trains by an objective of its own is refused."""
        require_known(options, type(self).__name__)
        self.method = method or DEFAULT
        self.method.require_plain_training()
        self._forget, self._retain = forget, retain
        self._options = options
        self._folder = None if folder is None else Path(folder)
        self._run: Session | None = None
        # Kept for the next training of this callback: of which model, and the run.
        self._kept: tuple[weakref.ref[nn.Module], dict[str, Any]] | None = None

    @property
    def report(self) -> Report:
        """The account so far; complete after the training."""
        if self._run is None:
            raise RuntimeError(f"there is no report before {self._training} has begun")
        return self._run.report

    def close(self) -> None:
        """Takes every hook off the model and the optimizers; safe at any time, and twice."""
        if self._run is not None:
            self._run.close()

    # ------------------------------------------------------------------ for the adapters

    def _begin(
        self,
        model: nn.Module,
        retain: Data | Measurement | None,
        read: Callable[[Data], Data],
        optimizers: Iterable[Any],
        *,
        folder: Path,
        progress: bool,
        stored: Callable[[], dict[str, Any]] | None = None,
    ) -> Session:
        """All phases up to the guard; `stored` verifies and returns the run to go on with."""
        self.close()
        kept = None
        if stored is None and self._kept is not None and self._kept[0]() is model:
            kept = {**self._kept[1], "model": None}  # it is trained on in this very process
        options = self._read_options(read, progress)
        resumes = stored is not None or kept is not None
        require_same_way(resumes)
        forget = None if self._forget is None else read(self._forget)
        if retain is not None and not isinstance(retain, Measurement):
            retain = read(retain)
        run = Session(model, self.method, **options)
        if resumes:
            take_up(run, stored() if stored is not None else cast(Any, kept), forget, retain)
        elif forget is None or retain is None:
            raise ValueError(
                f"{type(self).__name__} has no {'forget' if forget is None else 'retain'} set; it "
                "can be left out only where a stored run is taken up"
            )
        else:
            begin(run, forget, retain)
        self._run, self._kept = run, (weakref.ref(model), run.state_dict())
        run.guard(*optimizers)
        write_report(run.report, folder)
        return run

    def _finish(self, folder: Path, *, averaged: bool = False) -> Report | None:
        """Counts, scores and reports, after an error too; None if there is nothing to finish.

        `averaged`: whether the loop wrote an average into the model, which rounds frozen entries.
        """
        run = self._run
        if run is None or run.report.phase != "guarded":
            return None
        try:
            if averaged:
                run.hold()
            report = run.finish()
        except BaseException:
            leave_report(run.report, folder)
            raise
        finally:
            self.close()
        write_report(report, folder)
        return report

    def _sealed(self, model: nn.Module) -> dict[str, Any] | None:
        """What a checkpoint of the model's present weights stores, if a run has begun."""
        if self._kept is None:
            return None
        progress: Mapping[str, Any] = {} if self._run is None else self._run.so_far()
        return sealed.seal({**self._kept[1], **progress}, model)

    def _known_of_forget(
        self, model: nn.Module, read: Callable[[Data], Data], progress: bool
    ) -> dict[str, float]:
        """What the model still knows of the forget set, by the names that are logged; empty where
        it is not scored."""
        if self._run is None or self._forget is None or not self._options.get("scores", True):
            return {}
        scores = scored(
            model,
            {"forget": read(self._forget)},
            self._options.get("loss_fn"),
            membership=False,
            progress=progress,
        )
        if isinstance(scores, str):
            return {}
        forget = scores.sets["forget"]
        return {
            "deepclean_forget_accuracy": forget.accuracy,
            "deepclean_forget_loss": forget.loss,
        }

    def _read_options(self, read: Callable[[Data], Data], progress: bool) -> Options:
        options = Options(**self._options)
        test, forget_test = options.get("test"), options.get("forget_test")
        options["test"] = None if test is None else read(test)
        options["forget_test"] = None if forget_test is None else read(forget_test)
        options["progress"] = self._shows(progress)
        return options

    def _shows(self, progress: bool) -> bool:
        """Whether bars are shown: where both the loop and the option say so."""
        return progress and self._options.get("progress", True)

    def _loader(self, data: Any, like: DataLoader[Any]) -> Data:
        """The data set read as a loader of the loop reads its own, unless an option says how."""
        batch_size = self._options.get("batch_size") or like.batch_size or 1
        collate_fn = self._options.get("collate_fn") or like.collate_fn
        loader: Data = DataLoader(data, batch_size=batch_size, collate_fn=collate_fn)
        return loader
