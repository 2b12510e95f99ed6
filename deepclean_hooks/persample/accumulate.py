"""Sums of squares over many batches, in the precision asked for.

A batch's squares of a small parameter are added at once, in float64, and nothing else of it lives
from one batch to the next: 4 bytes an entry beside a small network's activations were 4 to 10 % of
its peak. A float64 addition of a large one costs a pass over 12 bytes an entry, from memory and not
from the cache, so it has a float32 scratch that is flushed every FLUSH_EVERY batches; a short
float32 sum loses at most a few units in the last place (5.8e-7 over 47 batches, measured).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepclean_hooks.persample.outer import Product

FLUSH_EVERY = 16  # batches
SCRATCH_FROM = 2**20  # entries of a parameter with a scratch
PRODUCT_BYTES = 2**25  # of a product on its way into its total, at most

# Entries converted at a time: torch would hold the whole of a float32 addend in float64, and a
# piece that stays in the second-level cache is 3 times as quick.
CONVERTED = 2**16


class Sums:
    """One sum for each parameter, in `dtype`, on the parameter's device.

    `scratch` holds what was added to large parameters since the last flush; whoever adds to one of
    its tensors in place hands that tensor to `add`, which then leaves it at that.
    """

    def __init__(self, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._parameters, self._dtype = parameters, dtype
        self._totals: dict[str, Tensor] = {}  # made when first needed: a self-check comes before
        self.scratch: dict[str, Tensor] = {}
        self._products: dict[str, list[Product]] = {}
        self._batches = 0

    def add(self, name: str, squares: Tensor | Product) -> None:
        """Adds a sum of squares of the parameter's shape (a product may be flat); it may become the
        sum itself."""
        if isinstance(squares, Product):
            self._products.setdefault(name, []).append(squares)
            return
        squares = squares.detach().reshape(self._parameters[name].shape)
        if squares.numel() < SCRATCH_FROM or squares.dtype == self._dtype:
            self._add_total(name, squares)
        elif name not in self.scratch:
            self.scratch[name] = squares
        elif squares.data_ptr() != self.scratch[name].data_ptr():
            self.scratch[name].add_(squares)

    def _add_total(self, name: str, squares: Tensor) -> None:
        if name in self._totals:
            add_converted(self._totals[name], squares)
        else:
            self._totals[name] = squares.to(self._dtype)

    def end_batch(self) -> bool:
        """Counts a batch; returns whether what waited was flushed."""
        self._batches += 1
        if self._batches % FLUSH_EVERY:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Moves what waits into the totals, one tensor after the other."""
        for name in {*self.scratch, *self._products}:
            self._flush(name)

    def any(self, name: str) -> bool:
        """Whether a sum has an entry that is not 0."""
        kept = [sums[name] for sums in (self._totals, self.scratch) if name in sums]
        products = self._products.get(name, [])
        return any(bool(t.any()) for t in kept) or any(
            bool(p.left.any() and p.right.any()) for p in products
        )

    def added(self) -> list[str]:
        """The names to which something was added."""
        return list(dict.fromkeys((*self._totals, *self.scratch, *self._products)))

    def restore(self, name: str, total: Tensor) -> None:
        """Adds what `take` gave up."""
        self._add_total(name, total)

    def take(self, name: str) -> Tensor:
        """One sum, which is no longer kept here afterwards."""
        self._flush(name)
        total = self._total(name)
        del self._totals[name]
        return total

    def _flush(self, name: str) -> None:
        if name in self.scratch:
            self._add_total(name, self.scratch.pop(name))
        if name in self._products:
            self._multiply_out(self._total(name), self._products.pop(name))

    def _total(self, name: str) -> Tensor:
        if name not in self._totals:
            like = self._parameters[name]
            self._totals[name] = torch.zeros_like(like, dtype=self._dtype, requires_grad=False)
        return self._totals[name]

    @staticmethod
    def _multiply_out(total: Tensor, products: list[Product]) -> None:
        left = torch.cat([p.left for p in products])  # (N, O)
        right = torch.cat([p.right for p in products])  # (N, D)
        flat = total.view(left.shape[1], right.shape[1])
        step = max(1, PRODUCT_BYTES // (right.shape[1] * right.element_size()))
        for first in range(0, len(flat), step):
            part = Product(left[:, first : first + step], right)
            flat[first : first + step].add_(part.value())

    def totals(self) -> dict[str, Tensor]:
        """The sums, flushed, of every parameter; they stay ours until this object is dropped."""
        self.flush()
        return {name: self._total(name) for name in self._parameters}


def add_converted(total: Tensor, addend: Tensor) -> None:
    """total += addend, of the same shape and any floating-point type, in pieces on the CPU."""
    one, other = _in_memory_order(total), _in_memory_order(addend)
    whole = total.dtype == addend.dtype or total.device.type != "cpu"
    if whole or total.stride() != addend.stride() or one is None or other is None:
        total.add_(addend)
        return
    for first in range(0, len(one), CONVERTED):
        one[first : first + CONVERTED].add_(other[first : first + CONVERTED])


def _in_memory_order(tensor: Tensor) -> Tensor | None:
    """The entries in one dimension as they lie in memory; None if they do not lie densely."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None
