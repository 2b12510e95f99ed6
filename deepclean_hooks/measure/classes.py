"""How many samples of each class a measurement is of, where its batches tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from deepclean_hooks import ranks
from deepclean_hooks.data import batches
from deepclean_hooks.data.batches import Batch

Counts = dict[str, int]
"""Class -> samples; the class as text, as it is in a file."""


def class_labels(batch: Batch) -> Tensor | None:
    """The class indices (N,) of a batch `(x, y)` or of a mapping with `labels`; None for others."""
    labels = batches.labels_of(batch)
    whole = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    return labels if whole else None


class Counted:
    """The labels of the batches that are added, counted at the end: a GPU is not waited for."""

    def __init__(self) -> None:
        self._labels: list[Tensor] | None = []

    def add(self, batch: Batch, counted: int | None = None) -> None:
        """Takes the labels of a batch, or of its first samples only."""
        labels = class_labels(batch)
        if labels is None or self._labels is None:
            self._labels = None
        else:
            self._labels.append(labels[:counted])

    def over_ranks(self) -> Counts | None:
        """The counts of all ranks, which call this together; None if a batch had no labels."""
        mine: Counter[str] | None = None
        if self._labels is not None:
            mine = Counter(str(label) for part in self._labels for label in part.tolist())
        everyone = [counts for counts in ranks.gather(mine) if counts is not None]
        if len(everyone) < ranks.world()[1]:
            return None
        return _sorted(sum(everyone, Counter()))


def combined(mine: Counts | None, theirs: Counts | None, sign: int) -> Counts | None:
    """The counts of both sets together (sign 1), or of the first without the second (-1)."""
    if mine is None or theirs is None:
        return None
    counts = Counter(mine)
    counts.update({label: sign * count for label, count in theirs.items()})
    return _sorted({label: count for label, count in counts.items() if count})


def shared(mine: Counts | None, theirs: Counts | None) -> list[str] | None:
    """The classes of both sets, in order; None where the classes of either are not known."""
    if mine is None or theirs is None:
        return None
    return list(_sorted({label: 0 for label in mine.keys() & theirs.keys()}))


def _sorted(counts: Mapping[str, int]) -> Counts:
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))
