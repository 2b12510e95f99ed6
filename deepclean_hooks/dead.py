"""Reset entries that can never train: their gradient on the retain set is exactly 0."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deepclean_hooks import batches, losses, measure, ranks
from deepclean_hooks.losses import LossFn
from deepclean_hooks.samples import Samples

BATCHES = (
    8  # of the retain set, on each rank: an entry that no sample of them reaches counts as dead
)
WARN_ABOVE = 0.03


def dead_entries(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    retain: Samples,
    loss_fn: LossFn,
    *,
    batch_statistics: bool,
) -> dict[str, int]:
    """How many entries of each mask have gradient exactly 0 in every one of the first batches of
    the retain set.

    A ReLU behind a channel whose scale and shift are 0 passes no gradient to anything before or
    after it, in this step or any later one. `batch_statistics`: normalise as a training loop does
    that updates running statistics; with the old ones a channel may look dead that the first
    training step wakes up. The model is left as it was.
    """
    with measure.no_trace(model) as inner, measure.float32_weights(inner) as dtype:
        named = dict(inner.named_parameters())
        parameters = {name: named[name] for name in masks}
        alive = {name: torch.zeros_like(mask) for name, mask in masks.items()}
        if batch_statistics:
            for module in inner.modules():
                module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        device = measure.device_of(inner)
        walked = measure.walk(retain, device=device, dtype=dtype)
        with ranks.fail_together():
            for batch in itertools.islice(walked, BATCHES):
                if batches.size(batch) == 1 and batch_statistics:
                    continue  # BatchNorm cannot normalise one sample by itself
                loss = losses.per_sample(loss_fn(inner, batch), batches.size(batch)).mean()
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        alive[name] |= gradient != 0
    # Not 8 bits: 256 ranks would add up to 0.
    counts = {name: tensor.to(torch.int32) for name, tensor in alive.items()}
    ranks.sum_over_ranks(counts)
    return {name: int((mask & (counts[name] == 0)).sum()) for name, mask in masks.items()}
