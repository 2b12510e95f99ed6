"""Where the samples of a batch lie in a tensor, found with a NaN.

N: samples. Sequence-first attention and windowed attention fold the batch into other dimensions, so
"dimension 0" is a guess. The probe fills one sample of the batch with NaN: wherever it comes out is
where that sample lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PROBE_SAMPLES = 3
MARKED = 1  # the sample filled with NaN: neither the first nor the last, so an offset of one shows


class Unserved(Exception):
    """An operation that no rule can serve, with the reason: its parameters go to the one-sample
    loop."""


@dataclass(frozen=True)
class Layout:
    """Dimension `dim` has size outer * N * inner, and the middle factor counts the samples."""

    dim: int
    outer: int = 1

    def blocks(self, shape: Sequence[int]) -> int:
        """How many blocks of N samples the flattened tensor is made of."""
        return math.prod(shape[: self.dim]) * self.outer

    def rows(self, tensor: Tensor, n: int) -> Tensor:
        """The tensor as (N, T, last): the T feature vectors of each sample."""
        if self.dim >= tensor.dim() - 1:
            raise Unserved("samples lie in the feature dimension")
        blocks, last = self.blocks(tensor.shape), tensor.shape[-1]
        split = tensor.reshape(blocks, n, -1, last)  # (blocks, N, inner, last)
        return split[0] if blocks == 1 else split.transpose(0, 1).reshape(n, -1, last)

    def images(self, tensor: Tensor, n: int) -> Tensor:
        """The tensor (outer * N * inner, C, ...) as (N, R, C, ...): the R maps of each sample."""
        if self.dim != 0:
            raise Unserved(f"samples lie in dimension {self.dim} of a channels-first tensor")
        split = tensor.reshape(self.outer, n, -1, *tensor.shape[1:])
        return split[0] if self.outer == 1 else split.transpose(0, 1).flatten(1, 2)

    def separated(self, tensor: Tensor, n: int) -> Tensor:
        """The tensor with its sample dimension opened: (..., outer, N, inner, ...)."""
        inner = tensor.shape[self.dim] // (self.outer * n)
        head, tail = tensor.shape[: self.dim], tensor.shape[self.dim + 1 :]
        return tensor.reshape(*head, self.outer, n, inner, *tail)

    def shifted(self, ranks: int) -> Layout:
        """The same place in a tensor with `ranks` more leading dimensions."""
        return Layout(self.dim + ranks, self.outer)


def find(probed: Tensor, n: int = PROBE_SAMPLES) -> Layout | None:
    """The layout of a tensor that came from a batch whose sample MARKED is NaN; None if it shows
    none.

    The NaNs may fill a part of that sample only (a class token, padding), but no other sample.
    """
    if not probed.is_floating_point():
        return Layout(0) if probed.dim() and probed.shape[0] % n == 0 else None
    nan = torch.isnan(probed).reshape(-1)
    if not nan.any():
        return None
    before = 1
    for dim, length in enumerate(probed.shape):
        if length % n == 0:
            for outer in _divisors(length // n):
                slots = nan.view(before * outer, n, -1)
                others = torch.cat([slots[:, :MARKED], slots[:, MARKED + 1 :]], 1)
                if not others.any():
                    return Layout(dim, outer)
        before *= length
    return None


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def unbroadcast(grad: Tensor, shape: Sequence[int], layout: Layout, n: int) -> Tensor:
    """The gradient of each sample, (N, *shape), of an operand of `shape` that was broadcast to
    `grad.shape`."""
    own = (1,) * (grad.dim() - len(shape)) + tuple(shape)
    opened = layout.separated(grad, n)  # (..., outer, N, inner, ...)
    inner = opened.shape[layout.dim + 2]
    if own[layout.dim] not in (1, inner) or (own[layout.dim] != 1 and layout.outer != 1):
        raise Unserved("the operand varies along the samples")
    opened = opened.movedim(layout.dim + 1, 0)  # (N, ..., outer, inner, ...)
    target = (*own[: layout.dim], 1, own[layout.dim], *own[layout.dim + 1 :])
    summed = [i + 1 for i, k in enumerate(target) if k == 1 and opened.shape[i + 1] != 1]
    if summed:
        opened = opened.sum(summed, keepdim=True)
    return opened.reshape(n, *shape)
