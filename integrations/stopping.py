"""Ending a run when the forget set is met as unseen data and the retain set is back."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deepclean_hooks import ranks
from deepclean_hooks.data.samples import Data, Samples
from deepclean_hooks.measure.answers import answers
from deepclean_hooks.methods.settings import require_positive
from deepclean_hooks.metrics.forgetting import accuracy, forgetting

MOST = 1000  # retain samples that are looked at, evenly spread
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WhenForgotten:
    """`unlearn(..., stop=WhenForgotten(held_out))`: looks every so many optimizer steps, and ends
    the run when the losses of the forget set are no lower than those of `held_out`, unseen data of
    the same kind (a two-sample test at 5 per cent, class by class), and the accuracy on the retain
    set is within `retain_points` of the original's.

    A look is a forward pass over both sets and at most 1,000 retain samples. The learning rate
    falls as if the run went on to its end.
    """

    held_out: Data = field(repr=False)
    every: int = 20
    retain_points: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a setting that is no positive number."""
        require_positive(every=self.every, retain_points=self.retain_points)


class Watch:
    """One run's looks."""

    def __init__(self, stop: WhenForgotten, model: nn.Module, retain: Samples) -> None:
        """Looks at the original model; all ranks call this."""
        self._stop = stop
        self._retain = retain
        if retain.indices is not None:
            every = -(-len(retain.indices) // MOST)
            self._retain = dataclasses.replace(retain, indices=retain.indices[::every])
        self._before = self._accuracy(model)
        self._last = "the forget set was not looked at: the run ended before"

    def ends(self, model: nn.Module, forget: Samples, steps: int) -> bool:
        """Whether a run of so many steps ends here; all ranks call this."""
        if steps % self._stop.every:
            return False
        found, kept = forgetting(model, forget, self._stop.held_out), self._accuracy(model)
        self._last = f"after {steps} steps {found}; retain accuracy {kept:.1f}, {self._before:.1f} "
        self._last += "of the original"
        if ranks.is_first():
            _log.info(self._last)
        return found.forgotten and kept >= self._before - self._stop.retain_points

    @property
    def last(self) -> str:
        """What was seen last, in words."""
        return self._last

    def _accuracy(self, model: nn.Module) -> float:
        return 100 * accuracy(answers(model, self._retain, "retain"))


def required(stop: Any) -> WhenForgotten | None:
    """The setting; raises TypeError for anything else."""
    if stop is not None and not isinstance(stop, WhenForgotten):
        raise TypeError(f"stop must be WhenForgotten(held_out), got {stop!r}")
    return stop
