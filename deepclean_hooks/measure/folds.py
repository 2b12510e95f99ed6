"""The Fisher diagonal of a set and of the parts that it falls into: how far single samples, not the
set, make an entry large."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepclean_hooks.measure.fisher import FisherDiagonal, PerSampleFisher, diagonal, diagonals
from deepclean_hooks.measure.request import Request
from deepclean_hooks.ranks import shards


@dataclass(frozen=True)
class FoldedDiagonal(FisherDiagonal):
    """A FisherDiagonal, and for each entry the lowest mean among disjoint parts of its samples.

    `lowest`: parameter name -> tensor like the sum; empty where the samples could not be parted
    (a single sample, or a stream). `parts`: how many there are.
    """

    lowest: dict[str, Tensor] = field(default_factory=dict)
    parts: int = 1

    def of_lowest(self) -> FisherDiagonal:
        """The lowest means as a diagonal of one sample, to compare it as others are compared."""
        return FisherDiagonal(self.lowest, 1, self.samples, self.settings)


@dataclass(frozen=True)
class FoldedFisher(PerSampleFisher):
    """The exact Fisher diagonal, measured in `folds` disjoint parts; their sum is that of the set.

    Sample i is in part i modulo `folds`. The lowest mean costs one tensor an entry more.
    """

    folds: int = 3

    def __call__(self, request: Request) -> FoldedDiagonal:
        """The diagonal of what is requested, and its lowest means."""
        data = request.data
        folds = min(self.folds, len(data.indices or ()))
        if folds < 2:
            return _folded(diagonal(request), {}, 1)
        assert data.indices is not None  # there are two at least
        parts = [
            dataclasses.replace(data, indices=data.indices[first::folds]) for first in range(folds)
        ]
        total: FisherDiagonal | None = None
        lowest: dict[str, Tensor] = {}
        for found in diagonals(request, parts):
            mean = found.mean()
            lowest = {n: _lower(lowest[n], m) for n, m in mean.items()} if lowest else mean
            total = found if total is None else total + found
        assert total is not None
        return _folded(total, lowest, folds)


def _folded(total: FisherDiagonal, lowest: dict[str, Tensor], parts: int) -> FoldedDiagonal:
    return FoldedDiagonal(**vars(total), lowest=lowest, parts=parts)


def _lower(one: Tensor, other: Tensor) -> Tensor:
    # On the shards: torch 2.7 has no minimum of sharded tensors.
    return shards.sharded_as(torch.minimum(shards.local(one), shards.local(other)), one)
