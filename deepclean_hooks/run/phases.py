"""What a session holds in each of its phases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from deepclean_hooks.guard.guard import Guard
from deepclean_hooks.measure.request import Measured
from deepclean_hooks.methods.adding import Adding
from deepclean_hooks.methods.method import Mask, Selection
from deepclean_hooks.methods.term import Term
from deepclean_hooks.stored.originals import Originals
from deepclean_hooks.tuning.gamma_auto import Trials


@dataclass(frozen=True)
class Phase:
    """One phase; `name` is what the report calls it."""

    name: ClassVar[str]


@dataclass(frozen=True)
class New(Phase):
    """Nothing has happened."""

    name = "new"


@dataclass(frozen=True)
class WasMeasured(Phase):
    """D_f and D_r are measured; `trials` are still to choose a hyper-parameter, if there are
    any."""

    name = "measured"
    measured: Measured
    trials: Trials | None


@dataclass(frozen=True)
class WasSelected(Phase):
    """W_f is picked, and the weights are untouched."""

    name = "selected"
    measured: Measured
    selection: Selection
    free: Mask


@dataclass(frozen=True)
class WasReset(Phase):
    """W_f has its new values; what it takes to go on from here, now or after a resume.

    `frozen`: digest of the entries that may not move; `changed`: how many entries the reset
    changed, by parameter; `term`: what the method adds to the loop's objective; `steps` of
    optimizers, and `added`, those that the term was added to, of the runs that this one goes on
    from. A resumed run has no selection and no originals.
    """

    name = "reset"
    free: Mask
    frozen: str
    changed: dict[str, int]
    selection: Selection | None = None
    originals: Originals | None = None
    term: Term | None = None
    steps: int = 0
    added: int = 0
    resumed: bool = False


@dataclass(frozen=True)
class Guarded(Phase):
    """The frozen entries are held since `started`, by time.perf_counter()."""

    name = "guarded"
    reset: WasReset
    guard: Guard
    adding: Adding | None
    started: float

    def so_far(self) -> WasReset:
        """What it takes to go on from here."""
        added = self.reset.added if self.adding is None else self.adding.done
        return replace(self.reset, steps=self.reset.steps + self.guard.steps, added=added)


@dataclass(frozen=True)
class Closed(Phase):
    """The guard was let go of before the end: an exception in the loop, or `close()`."""

    name = "closed"
    reset: WasReset


@dataclass(frozen=True)
class Failed(Phase):
    """The end found something that may not be."""

    name = "failed"


@dataclass(frozen=True)
class Finished(Phase):
    """All is counted."""

    name = "finished"
    reset: WasReset
