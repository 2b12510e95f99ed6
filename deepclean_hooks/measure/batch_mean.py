"""Estimators made of gradients of whole batches: what published code computes, and signed sums.

A gradient of a batch mean, squared, is no Fisher: E[g^2] = mu^2 + sigma^2 / B changes with the
batch size B, and thresholds do not carry over from one B to another.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.data.walk import walk
from deepclean_hooks.measure.estimator import Estimator, rebatched
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.measure.request import Request, all_samples
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.gradients import gradients

Objective = Callable[[nn.Module, Batch], Tensor]
"""Maps (model, batch) to a scalar."""


class _BatchGradients(Estimator):
    """Sums over batches of a function of the batch's gradient; batches in index order."""

    batch_size: int
    additive = False
    sums_samples: ClassVar[bool] = False  # whether the objective is a sum and not a mean

    @abstractmethod
    def objective(self, loss_fn: LossFn) -> Objective:
        """The scalar whose gradient is taken of each batch."""

    @abstractmethod
    def term(self, gradient: Tensor) -> Tensor:
        """What is added up."""

    def terms(self, batch: Batch) -> int:
        """How many terms of the mean a batch is."""
        return 1

    def source(self, data: Samples, name: str) -> Samples:
        """The samples in the batches and in the order they are walked in."""
        return rebatched(self, data, self.batch_size, name)

    accumulate: torch.dtype | None = None  # None: the weights' own, as the published code does

    def _value(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor:
        objective = self.objective(loss_fn)
        if batches.size(batch) > 1:
            return objective(model, batch)
        # With its own copy: see persample.loop for the reason.
        twice = objective(model, batches.rows(batch, torch.tensor([0, 0])))
        return twice / 2 if self.sums_samples else twice

    def __call__(self, request: Request) -> Measurement:
        """One backward pass a batch."""
        no_trace.require_precision(request.inner, self.accumulate)
        source = self.source(request.data, request.name)
        settings = self.described(request, batch_size=self.batch_size)
        wanted = request.weights
        count = 0
        ids: list[int] = []
        with no_trace.no_trace(request.model) as inner, no_trace.float32_weights(inner) as dtype:
            sums = {n: torch.zeros_like(p, dtype=self.accumulate) for n, p in wanted.items()}
            device = no_trace.device_of(inner)
            label = request.label("gradients")
            walked = walk(source, device=device, dtype=dtype, progress=label, ids=ids)
            with ranks.fail_together():
                for batch in walked:
                    count += self.terms(batch)
                    # A tensor kept from the batch before belongs to a graph that is gone.
                    no_trace.drop_caches(inner)
                    value = self._value(inner, batch, request.loss_fn)
                    for key, gradient in _gradients(value, wanted):
                        sums[key] += self.term(gradient)
        ranks.sum_over_ranks(sums)
        count = sum(ranks.gather(count))
        settings["computed"] = str(next(iter(wanted.values())).dtype).removeprefix("torch.")
        return Measurement(sums, count, all_samples(ids), settings)


def _gradients(value: Tensor, wanted: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    for name, gradient in zip(wanted, gradients(value, list(wanted.values())), strict=True):
        if gradient is not None:
            if not torch.isfinite(gradient.sum()):
                raise ValueError(
                    f"the gradient of {name} is NaN or infinite; check the inputs and the weights"
                )
            yield name, gradient


@dataclass(frozen=True)
class BatchMean(_BatchGradients):
    """Squares of gradients of the mean loss of each batch, averaged over the batches.

    Compatibility with the published code of Selective Synaptic Dampening, which calls this the
    Fisher diagonal (its batch size: 64). The result changes with `batch_size` and with the order of
    the samples: that of the data sets, the retain set's first, as published, or one drawn by
    `seed`, as in the code of Kodge et al. The order matters: with the published one the batches of
    the forget set come again at the end of D, so that I_Df <= |D| / |D_f| * I_D but for the way
    samples fall into batches, and alpha 10 selects next to nothing for a tenth of the data.
    """

    batch_size: int = 64
    seed: int | None = None

    def source(self, data: Samples, name: str) -> Samples:
        """In their own order, or in one drawn by the seed."""
        data = super().source(data, name)
        if self.seed is None or data.indices is None:
            return data
        drawn = torch.randperm(
            len(data.indices), generator=torch.Generator().manual_seed(self.seed)
        )
        return dataclasses.replace(data, indices=tuple(data.indices[i] for i in drawn.tolist()))

    def objective(self, loss_fn: LossFn) -> Objective:
        """The mean loss."""
        return lambda model, batch: losses.per_sample(
            loss_fn(model, batch), batches.size(batch)
        ).mean()

    def _value(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor:
        """A batch of one by itself too, as in the published code, which it follows bit for bit."""
        return self.objective(loss_fn)(model, batch)

    def term(self, gradient: Tensor) -> Tensor:
        """Its square."""
        return gradient.square()


@dataclass(frozen=True)
class OutputMagnitude(_BatchGradients):
    """Absolute gradients of the mean of ||f(x)||^2 over each batch, averaged over the batches.

    Needs no labels. Aljundi et al., "Memory Aware Synapses"; with batches of 64 as in the published
    code of loss-free SSD. With `batch_size=1` it is the mean over samples and depends on no order.
    """

    batch_size: int = 64

    def objective(self, loss_fn: LossFn) -> Objective:
        """The mean squared length of the output."""
        return _mean_squared_length

    def term(self, gradient: Tensor) -> Tensor:
        """Its absolute value."""
        return gradient.abs()


def _mean_squared_length(model: nn.Module, batch: Batch) -> Tensor:
    logits, _ = losses.logits_and_labels(model, batch)  # (N, C)
    return logits.square().sum(1).mean()


@dataclass(frozen=True)
class MeanGradient(_BatchGradients):
    """The gradient of the loss, averaged over the samples: signed, and so independent of batches.

    The sums are of each sample's gradient, in float64.
    """

    batch_size: int = 64
    additive = True
    accumulate = torch.float64
    sums_samples = True

    def source(self, data: Samples, name: str) -> Samples:
        """In batches of its own size where it can choose, on any number of ranks."""
        if data.indices is None:
            return data
        return dataclasses.replace(data, batch_size=self.batch_size)

    def objective(self, loss_fn: LossFn) -> Objective:
        """The sum of the losses."""
        return lambda model, batch: losses.per_sample(
            loss_fn(model, batch), batches.size(batch)
        ).sum()

    def terms(self, batch: Batch) -> int:
        """One a sample."""
        return batches.size(batch)

    def term(self, gradient: Tensor) -> Tensor:
        """Itself."""
        return gradient
