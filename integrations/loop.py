"""`with unlearning(model, ...)`: unlearning around a training loop of your own."""

from __future__ import annotations

import atexit
import logging
import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from typing_extensions import Unpack

from deepclean_hooks import ranks
from deepclean_hooks.data.samples import Data
from deepclean_hooks.guard.optimizers import require_readable
from deepclean_hooks.integrations.beginning import begin, take_up
from deepclean_hooks.integrations.run_output import leave_report, require_folder, write_report
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.options import Options, require_known
from deepclean_hooks.report.report import Report
from deepclean_hooks.session import Session

_log = logging.getLogger(__name__)


def unlearning(
    model: nn.Module,
    *,
    forget: Data,
    retain: Data | Measurement,
    method: Method,
    resume: Mapping[str, Any] | None = None,
    optimizers: Iterable[Any] = (),
    folder: str | Path | None = None,
    **options: Unpack[Options],
) -> Unlearning:
    """Measures, selects and resets on entry; holds the frozen entries while your loop runs; reports
    on exit.

    Whichever optimizer steps the model inside the block is held to the mask. Yields the session:
    `run.report`, and `run.state_dict()` for a checkpoint. With `resume=` such a state (the model's
    weights loaded before) nothing is measured or reset again. An exception in the block takes every
    hook off and goes on. Without a block: `run = unlearning(...).start()`, and `run.finish()` after
    the loop.

    `optimizers`: those made before, and those that are no `torch.optim.Optimizer` (of fastai, for
    one). `folder`: where report.json and report.txt are written. The options are those of
    `Session`. Raises ValueError for a method that trains by an objective of its own, which
    `unlearn()` has.
    """
    require_known(options, "unlearning")
    if isinstance(method, Method):  # the session says what it is otherwise
        method.require_plain_training()
    return Unlearning(
        LoopRun(model, method, folder=folder, **options), forget, retain, resume, tuple(optimizers)
    )


class LoopRun(Session):
    """A session around a loop; its report goes to a folder, and a forgotten `finish` is noticed."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        folder: str | Path | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._unfinished = False  # begun by start(), neither finished nor closed
        super().__init__(model, method, **options)

    def measure(self, forget: Data, retain: Data | Measurement) -> Session:
        """As `Session.measure`; raises OSError before it if the folder cannot be made."""
        if self._folder is not None:
            require_folder(self._folder)
        return super().measure(forget, retain)

    def walk_to_guard(
        self,
        forget: Data | None,
        retain: Data | Measurement | None,
        resume: Mapping[str, Any] | None,
        optimizers: Iterable[Any],
    ) -> None:
        """All phases up to the guard."""
        optimizers = tuple(optimizers)
        require_readable(optimizers)
        if resume is not None:
            take_up(self, resume, forget, retain)
        else:
            begin(self, forget, retain)  # type: ignore[arg-type]  # None only where it resumes
        self.set_guard(optimizers)

    def set_guard(self, optimizers: Iterable[Any]) -> None:
        """The last phase before the loop, and the report of what has been done."""
        self.guard(*optimizers)
        self.write_report()

    def expect_finish(self) -> None:
        """From now on a forgotten `finish` is warned of."""
        self._unfinished = True
        _started.add(self)

    def finish(self) -> Report:
        """As `Session.finish`; writes the report into the folder, after an error too."""
        self._unfinished = False
        try:
            report = super().finish()
        except BaseException:
            if self._folder is not None:
                leave_report(self.report, self._folder)
            raise
        self.write_report()
        return report

    def close(self) -> None:
        """Takes every hook off the model and the optimizers; safe at any time, and twice."""
        self._unfinished = False
        super().close()

    def warn(self, text: str) -> None:
        """Adds a warning to the report, and gives it."""
        self._account.warn(text)

    def write_report(self) -> None:
        """Writes report.json and report.txt, if a folder was given."""
        if self._folder is not None:
            write_report(self.report, self._folder)

    def __del__(self) -> None:
        if getattr(self, "_unfinished", False):
            self.tell_unfinished("the run was dropped")
            self.close()

    def tell_unfinished(self, when: str) -> None:
        """Logs and warns that `finish` was forgotten."""
        _tell(
            f"{when} before run.finish(): frozen entries were not counted, nothing was scored and "
            "there is no report; keep what unlearning(...).start() returns, and call its finish() "
            "after the loop",
            self,
        )


class Unlearning(AbstractContextManager[Session]):
    """What `unlearning(...)` returns: a block to enter, or a run to start."""

    def __init__(
        self,
        run: LoopRun,
        forget: Data,
        retain: Data | Measurement,
        resume: Mapping[str, Any] | None,
        optimizers: tuple[Any, ...],
    ) -> None:
        self._run: LoopRun | None = run
        self._forget, self._retain = forget, retain
        self._resume, self._optimizers = resume, optimizers
        self._entered = False

    def __enter__(self) -> Session:
        self._entered = True
        run = self._run
        if run is None:
            raise RuntimeError(
                "start() was called already; call finish() of the run that it returned, and "
                "unlearning(...) again for another run"
            )
        try:
            run.walk_to_guard(self._forget, self._retain, self._resume, self._optimizers)
        except BaseException:
            run.close()
            raise
        return run

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run = self._run
        assert run is not None  # it was entered
        try:
            if kind is None:
                run.finish()
        finally:
            run.close()

    def start(self) -> Session:
        """As entering the block; call `finish()` of what this returns after the loop, or `close()`
        to leave it. A run that is dropped, or alive when Python ends, warns and lets go."""
        self.__enter__()
        run, self._run = self._run, None  # or this would keep it alive
        assert run is not None  # it was entered
        run.expect_finish()
        return run

    def __del__(self) -> None:
        if not self._entered:
            _tell(
                "unlearning(...) by itself does nothing: write `with unlearning(...) as run:` "
                "around the loop, or `run = unlearning(...).start()` before it",
                self,
            )


def _tell(text: str, source: object) -> None:
    if ranks.is_first():
        _log.warning(text)  # Python hides a ResourceWarning unless it is asked for them
    warnings.warn(text, ResourceWarning, source=source, stacklevel=3)


_started: weakref.WeakSet[LoopRun] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    for run in list(_started):
        if run._unfinished:
            run.tell_unfinished("the program ended")
            run.close()
