"""Sums of squares over many batches: a float32 scratch that is flushed into the precision asked
for.

A float64 addition for every batch costs a pass over 12 bytes an entry; a short float32 sum loses at
most a few units in the last place (5.8e-7 over 47 batches, measured), so it is flushed every
FLUSH_EVERY batches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepclean_hooks.persample.outer import Product

FLUSH_EVERY = 16
PRODUCT_BYTES = 2**25  # of a product on its way into its total, at most


class Sums:
    """One sum for each parameter, in `dtype`, on the parameter's device.

    `scratch` holds what was added since the last flush; whoever adds to one of its tensors in place
    hands that tensor to `add`, which then leaves it at that.
    """

    def __init__(self, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._parameters, self._dtype = parameters, dtype
        self._totals: dict[str, Tensor] = {}  # made when first needed: a self-check comes before
        self.scratch: dict[str, Tensor] = {}
        self._products: dict[str, list[Product]] = {}
        self._batches = 0

    def add(self, name: str, squares: Tensor | Product) -> None:
        """Adds a sum of squares of the parameter's shape (a product may be flat)."""
        if isinstance(squares, Product):
            self._products.setdefault(name, []).append(squares)
        elif name not in self.scratch:
            self.scratch[name] = squares.detach().reshape(self._parameters[name].shape)
        elif squares.data_ptr() != self.scratch[name].data_ptr():
            self.scratch[name].add_(squares.reshape(self.scratch[name].shape))

    def end_batch(self) -> bool:
        """Counts a batch; returns whether the scratch was flushed."""
        self._batches += 1
        if self._batches % FLUSH_EVERY:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Moves what waits into the totals, one tensor after the other."""
        for name in {*self.scratch, *self._products}:
            self._flush(name)

    def take(self, name: str) -> Tensor:
        """One sum, which is no longer kept here afterwards."""
        self._flush(name)
        total = self._total(name)
        del self._totals[name]
        return total

    def _flush(self, name: str) -> None:
        scratch = self.scratch.pop(name, None)
        if scratch is not None and name in self._totals:
            self._totals[name].add_(scratch)
        elif scratch is not None:
            self._totals[name] = scratch.to(self._dtype)
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
            flat[first : first + step] += part.value()

    def totals(self) -> dict[str, Tensor]:
        """The sums, flushed, of every parameter; they stay ours until this object is dropped."""
        self.flush()
        return {name: self._total(name) for name in self._parameters}
