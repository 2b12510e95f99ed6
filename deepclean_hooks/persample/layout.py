"""Where the samples of a batch lie in a tensor.

N: samples. Sequence-first attention and windowed attention fold the batch into other dimensions, so
"dimension 0" is a guess. A `Layout` is what the probe measured: it fills one sample of the batch
with NaN, and wherever that comes out is where the sample lies. Where no layout holds for all
batches (rows picked by a mask, tokens sorted by expert), `owners.Owners` finds it out in the
backward pass of each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PROBE_SAMPLES = 3
MARKED = 1  # the sample filled with NaN: neither the first nor the last, so an offset of one shows


class Unserved(Exception):
    """An operation that no rule can serve, with the reason: its parameters go to the one-sample
    loop."""


class Place(ABC):
    """Tells the samples of a tensor apart, for the rules."""

    @abstractmethod
    def rows(self, tensor: Tensor, n: int, features: int = 1) -> Tensor:
        """The tensor as (N, T, F): the T vectors of each sample, the last `features` dimensions
        being one vector."""

    @abstractmethod
    def images(self, tensor: Tensor, n: int) -> Tensor:
        """The tensor (M, C, ...) as (N, R, C, ...): the R maps of each sample."""

    @abstractmethod
    def unbroadcast(self, grad: Tensor, shape: Sequence[int], n: int) -> Tensor:
        """The gradient of each sample, (N, *shape), of an operand of `shape` that was broadcast to
        `grad.shape`."""

    @abstractmethod
    def only(self, grad: Tensor, sample: int, n: int) -> Tensor:
        """The gradient, zero outside one sample."""

    def in_order(self, shape: Sequence[int]) -> bool:
        """Whether `reshape(N, ...)` of a tensor of this shape tells its samples apart."""
        return False

    def each_once(self, tensor: Tensor, n: int) -> bool:
        """Whether dimension 0 is the samples, in order."""
        return False

    def require_outside(self, x: Tensor, features: int) -> None:
        """Raises Unserved if the samples lie in the last `features` dimensions."""
        return

    def require_first(self) -> None:
        """Raises Unserved if the samples do not lie in dimension 0."""
        return

    def broadcast(self, shape: Sequence[int], full: Sequence[int]) -> Place:
        """The same place after a tensor of `shape` was broadcast to `full`; raises Unserved if the
        samples' dimension was."""
        return self

    def held_by(self, shape: Sequence[int], full: Sequence[int]) -> Place | None:
        """Where an operand of `shape`, broadcast to `full`, holds the samples itself; None if it
        does not."""
        return None


@dataclass(frozen=True)
class Layout(Place):
    """Dimension `dim` has size outer * N * inner, and the middle factor counts the samples."""

    dim: int
    outer: int = 1

    def blocks(self, shape: Sequence[int]) -> int:
        """How many blocks of N samples the flattened tensor is made of."""
        return math.prod(shape[: self.dim]) * self.outer

    def rows(self, tensor: Tensor, n: int, features: int = 1) -> Tensor:
        self.require_outside(tensor, features)
        blocks, last = self.blocks(tensor.shape), math.prod(tensor.shape[-features:])
        split = tensor.reshape(blocks, n, -1, last)  # (blocks, N, inner, last)
        return split[0] if blocks == 1 else split.transpose(0, 1).reshape(n, -1, last)

    def images(self, tensor: Tensor, n: int) -> Tensor:
        self.require_first()
        split = tensor.reshape(self.outer, n, -1, *tensor.shape[1:])
        return split[0] if self.outer == 1 else split.transpose(0, 1).flatten(1, 2)

    def separated(self, tensor: Tensor, n: int) -> Tensor:
        """The tensor with its sample dimension opened: (..., outer, N, inner, ...)."""
        inner = tensor.shape[self.dim] // (self.outer * n)
        head, tail = tensor.shape[: self.dim], tensor.shape[self.dim + 1 :]
        return tensor.reshape(*head, self.outer, n, inner, *tail)

    def unbroadcast(self, grad: Tensor, shape: Sequence[int], n: int) -> Tensor:
        own = (1,) * (grad.dim() - len(shape)) + tuple(shape)
        opened = self.separated(grad, n)  # (..., outer, N, inner, ...)
        inner = opened.shape[self.dim + 2]
        if own[self.dim] not in (1, inner) or (own[self.dim] != 1 and self.outer != 1):
            raise Unserved("the operand varies along the samples")
        opened = opened.movedim(self.dim + 1, 0)  # (N, ..., outer, inner, ...)
        target = (*own[: self.dim], 1, own[self.dim], *own[self.dim + 1 :])
        summed = [i + 1 for i, k in enumerate(target) if k == 1 and opened.shape[i + 1] != 1]
        if summed:
            opened = opened.sum(summed, keepdim=True)
        return opened.reshape(n, *shape)

    def only(self, grad: Tensor, sample: int, n: int) -> Tensor:
        alone = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        part = self.separated(alone, n).select(self.dim + 1, sample)
        part.copy_(self.separated(grad, n).select(self.dim + 1, sample))
        return alone

    def in_order(self, shape: Sequence[int]) -> bool:
        return self.blocks(shape) == 1

    def each_once(self, tensor: Tensor, n: int) -> bool:
        return tensor.shape[0] == n

    def require_outside(self, x: Tensor, features: int) -> None:
        if self.dim >= x.dim() - features:
            raise Unserved("samples lie in the feature dimension")

    def require_first(self) -> None:
        if self.dim != 0:
            raise Unserved(f"samples lie in dimension {self.dim} of a channels-first tensor")

    def shifted(self, ranks: int) -> Layout:
        """The same place in a tensor with `ranks` more leading dimensions."""
        return Layout(self.dim + ranks, self.outer)

    def broadcast(self, shape: Sequence[int], full: Sequence[int]) -> Layout:
        moved = self.shifted(len(full) - len(shape))
        if full[moved.dim] != shape[self.dim]:
            raise Unserved("the dimension of the samples is broadcast")
        return moved

    def held_by(self, shape: Sequence[int], full: Sequence[int]) -> Layout | None:
        own = self.shifted(len(shape) - len(full))
        held = own.dim >= 0 and shape[own.dim] == full[self.dim] != 1
        return own if held else None

    def scaled(self, shape: Sequence[int], old: int, new: int) -> tuple[int, ...]:
        """The shape that a tensor of `old` samples has with `new` samples."""
        sizes = list(shape)
        sizes[self.dim] = sizes[self.dim] // old * new
        return tuple(sizes)


def find(probed: Tensor, n: int = PROBE_SAMPLES) -> Layout | None:
    """The layout of a tensor that came from a batch whose sample MARKED is NaN; None if it shows
    none.

    The NaNs may fill a part of that sample only (a class token, padding), but no other sample.
    """
    if not probed.is_floating_point():
        return None
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
