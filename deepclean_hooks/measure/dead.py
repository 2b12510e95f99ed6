"""Reset entries that can never train: their gradient on the retain set is exactly 0."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.data.walk import walk, walk_together
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.gradients import gradients
from deepclean_hooks.persample.plan import leaves
from deepclean_hooks.persample.planner import DEFAULT_MEMORY_BUDGET
from deepclean_hooks.persample.probe import groups
from deepclean_hooks.ranks import fsdp, shards

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
    with no_trace.no_trace(model) as inner, no_trace.float32_weights(inner) as dtype:
        named = dict(inner.named_parameters())
        parameters = {name: named[name] for name in masks}
        if batch_statistics and _pairs(retain):
            for module in inner.modules():
                module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        # BatchNorm cannot normalise one sample by itself.
        fewest = 2 if any(module.training for module in inner.modules()) else 1
        retain = dataclasses.replace(retain, batch_size=max(fewest, retain.batch_size))
        search = _Search(inner, parameters, retain, loss_fn, fewest, dtype)
        alive = search.reached_sharded() if fsdp.is_sharded(inner) else search.reached()
    return {name: shards.total(mask & ~alive[name]) for name, mask in masks.items()}


def _pairs(retain: Samples) -> bool:
    """Whether some rank has a batch of two samples."""
    if retain.indices is None:
        return retain.batch_size > 1
    return len(retain.indices) > ranks.world()[1]


@dataclass(frozen=True)
class _Search:
    """Which entries have a gradient in one of the first batches of the retain set; a batch of fewer
    samples than `fewest` is passed over."""

    model: nn.Module
    parameters: Mapping[str, Tensor]
    retain: Samples
    loss_fn: LossFn
    fewest: int
    dtype: torch.dtype | None

    def reached(self) -> dict[str, Tensor]:
        """True where the gradient is not 0 in one of the first batches of any rank."""
        alive = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in self.parameters.items()}
        walked = walk(self.retain, device=no_trace.device_of(self.model), dtype=self.dtype)
        with ranks.fail_together():
            for batch in itertools.islice(walked, BATCHES):
                if batches.size(batch) >= self.fewest:
                    loss = self._mean_loss(batch)
                    for name, gradient in _gradients(loss, self.parameters).items():
                        alive[name] |= gradient != 0
        # Not 8 bits: 256 ranks would add up to 0.
        counts = {name: tensor.to(torch.int32) for name, tensor in alive.items()}
        ranks.sum_over_ranks(counts)
        return {name: count > 0 for name, count in counts.items()}

    def reached_sharded(self) -> dict[str, Tensor]:
        """The same under FSDP2, sharded as the parameters; whole gradients of a part of the model
        at a time."""
        sharded = self.parameters
        alive = {n: torch.zeros_like(shards.local(p), dtype=torch.bool) for n, p in sharded.items()}
        whole = fsdp.Unsharded(self.model)
        unsharded = whole.parameters
        names = {id(p): name for name, p in unsharded.items()}
        device = no_trace.device_of(self.model)
        for group in groups({name: unsharded[name] for name in sharded}, DEFAULT_MEMORY_BUDGET):
            walked = walk_together(self.retain, device=device, dtype=self.dtype)
            for padded, counted in itertools.islice(walked, BATCHES):
                if batches.size(padded) < self.fewest:
                    continue
                # One that is too small is run as padded, for the other ranks, and not looked at.
                seen = counted >= self.fewest
                batch = batches.rows(padded, torch.arange(counted)) if seen else padded
                with ranks.fail_together():
                    loss = self._mean_loss(batch)
                beside = whole.one_of_each(leaves(loss, names))
                for name, gradient in _gradients(loss, group, beside).items():
                    nonzero = (gradient != 0).float().mul_(float(seen))
                    alive[name] |= shards.summed_part(nonzero, sharded[name]) > 0
        plain = {n: a.to(torch.int32) for n, a in alive.items() if not shards.is_shard(sharded[n])}
        ranks.sum_over_ranks(plain)
        alive.update({name: count > 0 for name, count in plain.items()})
        return {name: shards.sharded_as(part, sharded[name]) for name, part in alive.items()}

    def _mean_loss(self, batch: Batch) -> Tensor:
        # A tensor kept from the batch before belongs to a graph that is gone.
        no_trace.drop_caches(self.model)
        return losses.per_sample(self.loss_fn(self.model, batch), batches.size(batch)).mean()


def _gradients(
    loss: Tensor, parameters: Mapping[str, Tensor], beside: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    named = zip(parameters, gradients(loss, [*parameters.values(), *beside]), strict=False)
    return {name: gradient for name, gradient in named if gradient is not None}
