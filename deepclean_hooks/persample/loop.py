"""One sample at a time: slow, and right for every operation that autograd can differentiate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.model.gradients import gradients


def squared_gradients(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    loss_fn: LossFn,
    batch: Batch,
    counted: int | None = None,
    beside: Callable[[Tensor], list[Tensor]] = lambda loss: [],
) -> dict[str, Tensor]:
    """The sum over the batch of each sample's squared gradient, by name, in the parameter's shape
    and dtype; over its first `counted` samples if given, and then all of them run all the same.
    `beside(loss)`: what else each backward has to reach.

    The sample is shown twice and one of the two is read: PyTorch's BatchNorm backward on the CPU is
    wrong for a batch of one with channels-last gradients (100 % off on LeViT and XCiT).
    """
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    for i in range(batches.size(batch)):
        twice = batches.rows(batch, torch.tensor([i, i]))
        loss = losses.per_sample(loss_fn(model, twice), 2)[0]
        if not loss.requires_grad:
            break  # no parameter reaches the loss: every gradient is 0
        # retain_graph: a model may keep a derived tensor, and its graph, from one forward to the
        # next (LeViT).
        each = gradients(loss, [*parameters.values(), *beside(loss)], retain_graph=True)
        for name, gradient in zip(parameters, each, strict=False):
            if gradient is not None and (counted is None or i < counted):
                total[name].addcmul_(gradient, gradient)
        del gradient, each  # not held while the next ones are made
    return total
