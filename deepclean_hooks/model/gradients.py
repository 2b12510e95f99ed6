"""Gradients of a loss as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(
    loss: Tensor, tensors: Sequence[Tensor], *, retain_graph: bool = False
) -> list[Tensor | None]:
    """The gradient of the loss for each tensor, None where it does not reach one.

    Dense, of an embedding with sparse=True too: a sparse tensor has no addcmul_ and no isnan.
    """
    computed = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=retain_graph)
    return [None if each is None else _dense(each) for each in computed]


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
