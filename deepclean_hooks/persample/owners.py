"""Whose row is it? Found out in two backward passes where no layout holds for every batch.

N: samples, R: rows (leading dimensions flattened). The first pass weighs the loss of sample n by
2^(n - N / 2), the second by 1: the gradient of a row that belongs to sample n is 2^(n - N / 2)
times as large in the first, exactly, since a power of two scales every step of a backward pass
without rounding. A row for which no such power is found belongs to no single sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepclean_hooks.persample.layout import Place

OWNED_SAMPLES = 32  # of a pass: 2^-16 to 2^15, far from the ends of float32's range
ROUNDING = 64  # units in the last place, where an accelerator adds in another order


class Unowned(Exception):
    """A row of a gradient belongs to several samples at once."""


def weights(n: int, like: Tensor) -> Tensor:
    """The power of two by which the loss of each sample is weighed, (N,)."""
    return torch.exp2(torch.arange(n, device=like.device) - n // 2).to(like.dtype)


class Owners(Place):
    """Where the samples of one operation's gradient lie, known once `settle` was called."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._weighed: tuple[Tensor, Tensor] | None = None
        self._owner = torch.empty(0, dtype=torch.long)  # (leading dimensions), -1: gradient 0
        self._kept = self._slot = self._owner  # rows with an owner, and where each goes
        self._most = 1

    def weigh(self, grad: Tensor, lead: int) -> None:
        """Notes the gradient of the weighed loss, of which the first `lead` dimensions are rows."""
        self._weighed = _signature(grad, lead)

    def settle(self, grad: Tensor, lead: int) -> None:
        """Finds the owner of each row from the gradient of the plain loss; raises Unowned for a
        row of several."""
        if self._weighed is None:
            raise Unowned
        (heavy, heavy_sum), (plain, plain_sum) = self._weighed, _signature(grad, lead)
        self._weighed = None
        alive = plain > 0
        power = torch.where(alive, heavy / plain, 1).log2().round()
        scale = power.exp2()
        near = ROUNDING * torch.finfo(grad.dtype).eps * plain * scale
        sizes = plain.new_tensor(grad[(0,) * lead].numel() if grad.numel() else 1)
        right = (heavy - plain * scale).abs() <= near
        right &= (heavy_sum - plain_sum * scale).abs() <= near * sizes
        owner = power.long() + self.n // 2
        right &= (owner >= 0) & (owner < self.n)
        if not bool(torch.where(alive, right, heavy == 0).all()):
            raise Unowned
        self._owner = torch.where(alive, owner, -1)
        self._place()

    def _place(self) -> None:
        owner = self._owner.flatten()
        self._kept = (owner >= 0).nonzero()[:, 0]
        owned = owner[self._kept]
        counts = torch.bincount(owned, minlength=self.n)
        self._most = max(1, int(counts.max()))
        order = torch.argsort(owned, stable=True)
        starts = counts.cumsum(0) - counts
        within = torch.empty_like(owned)
        within[order] = torch.arange(len(owned), device=owned.device) - starts[owned[order]]
        self._slot = owned * self._most + within

    def _grouped(self, flat: Tensor) -> Tensor:
        """(R, ...) as (N, T, ...), zeros where a sample has fewer rows than another."""
        out = flat.new_zeros(self.n * self._most, *flat.shape[1:])
        out[self._slot] = flat[self._kept]
        return out.view(self.n, self._most, *flat.shape[1:])

    def rows(self, tensor: Tensor, n: int, features: int = 1) -> Tensor:
        return self._grouped(tensor.reshape(self._owner.numel(), -1))

    def images(self, tensor: Tensor, n: int) -> Tensor:
        return self._grouped(tensor)

    def unbroadcast(self, grad: Tensor, shape: Sequence[int], n: int) -> Tensor:
        own = (1,) * (grad.dim() - len(shape)) + tuple(shape)
        size = max(1, torch.Size(shape).numel())
        entry = torch.arange(size, device=grad.device).view(own).expand(grad.shape)
        owner = self._owned(grad).expand(grad.shape)
        kept = owner >= 0
        each = grad.new_zeros(n * size)
        each.index_add_(0, (owner * size + entry)[kept], grad[kept])
        return each.view(n, *shape)

    def only(self, grad: Tensor, sample: int, n: int) -> Tensor:
        return grad * (self._owned(grad) == sample)

    def _owned(self, grad: Tensor) -> Tensor:
        return self._owner.reshape(*self._owner.shape, *[1] * (grad.dim() - self._owner.dim()))


def _signature(grad: Tensor, lead: int) -> tuple[Tensor, Tensor]:
    """The largest size and the sum of each row, in the leading dimensions' shape."""
    flat = grad.detach().reshape(*grad.shape[:lead], -1)
    return flat.abs().amax(-1), flat.sum(-1)
