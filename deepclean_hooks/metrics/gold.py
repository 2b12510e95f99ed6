"""How far a model is from gold models (retrained without the forget set), and how far these are
from each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepclean_hooks.metrics.distance import Measured

AVERAGED = (
    "forget.accuracy",
    "retain.accuracy",
    "test.accuracy",
    "attack.confidence_svc.efficacy",
)
AVERAGE_GAP = (
    "mean of the absolute gaps to gold, in percentage points, of the accuracies on forget, retain "
    "and test and of the confidence attack's efficacy, as in the SalUn line of work: 0 is best"
)


@dataclass(frozen=True)
class Spread:
    """One figure of the gold models: how many they are, mean, standard deviation, extremes."""

    count: int
    mean: float
    deviation: float
    lowest: float
    highest: float

    @property
    def width(self) -> float:
        """The largest difference between two of the gold models."""
        return self.highest - self.lowest

    def holds(self, gap: float) -> bool | None:
        """Whether a gap to the mean is no larger than the largest difference between two gold
        models; None with fewer than two."""
        return None if self.count < 2 else abs(gap) <= self.width


def spreads(golds: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """The spread of each figure that every gold model has."""
    shared = [name for name in golds[0] if all(name in gold for gold in golds)] if golds else []
    return {name: _spread([gold[name] for gold in golds]) for name in shared}


def _spread(values: list[float]) -> Spread:
    mean = values[0] if len(values) == 1 else statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(len(values), mean, deviation, min(values), max(values))


def average_gap(gaps: Mapping[str, float], golds: Sequence[Mapping[str, float]]) -> Measured:
    """The SalUn line's average gap, and the mean of the same between pairs of gold models."""
    missing = [name for name in AVERAGED if name not in gaps]
    if missing:
        reason = f"it needs the gaps of {', '.join(AVERAGED)}; missing: {', '.join(missing)}"
        return Measured(
            AVERAGE_GAP, reason=reason if golds else "it needs a gold model: pass gold="
        )
    pairs = [
        statistics.fmean(abs(first[name] - second[name]) for name in AVERAGED)
        for i, first in enumerate(golds)
        for second in golds[:i]
    ]
    value = statistics.fmean(abs(gaps[name]) for name in AVERAGED)
    return Measured(AVERAGE_GAP, value, gold_to_gold=statistics.fmean(pairs) if pairs else None)
