"""The naive truth: one sample at a time, float64, plain autograd. Slow, and the definition of what
is measured."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def logits_of(output):
    """The logits in a tensor or a Hugging Face output."""
    return output if isinstance(output, Tensor) else output.logits


def squared_gradients(model: nn.Module, x: Tensor, y: Tensor, loss=None) -> dict[str, Tensor]:
    """sum over n of (d -log p(y_n | x_n) / d w)^2, by name, in float64; the model is not touched.

    Each sample is shown twice and the first read: BatchNorm's backward on the CPU is wrong for a
    batch of one with channels-last gradients.
    """
    truth = copy.deepcopy(model).double().eval()
    named = {n: p for n, p in truth.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p, requires_grad=False) for n, p in named.items()}
    x = x.double() if x.is_floating_point() else x
    for i in range(len(x)):
        out = logits_of(truth(x[[i, i]]))
        value = F.cross_entropy(out[:1], y[i : i + 1]) if loss is None else loss(out, y[[i, i]])[0]
        gradients = torch.autograd.grad(
            value, list(named.values()), allow_unused=True, retain_graph=True
        )
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient**2
    return total


def relative_error(ours: dict[str, Tensor], truth: dict[str, Tensor], zero: float = 1e-20) -> float:
    """The largest |ours - truth| over a tensor's largest entry; names must match.

    A tensor that is mathematically zero (an attention key bias) is compared with `zero` times the
    model's largest entry instead: both hold rounding noise only.
    """
    assert ours.keys() == truth.keys()
    largest = max(float(t.max()) for t in truth.values())
    worst = 0.0
    for name, expected in truth.items():
        found, scale = ours[name].double(), float(expected.max())
        difference = float((found - expected).abs().max())
        if scale <= zero * largest:
            worst = max(worst, 0.0 if float(found.max()) <= zero * largest else float("inf"))
        else:
            worst = max(worst, difference / scale)
    return worst


def difference_to_one_by_one(
    model: nn.Module, batch: dict[str, Tensor], sums: dict[str, Tensor]
) -> float:
    """The largest difference to the squared gradients of each sample shown twice, relative to the
    largest entry of its tensor; `batch` is a mapping of the model's arguments and `labels`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    truth = {name: torch.zeros_like(p) for name, p in parameters.items()}
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    for i, label in enumerate(batch["labels"]):
        logits = model(**{key: value[[i, i]] for key, value in inputs.items()})
        loss = F.cross_entropy(logits, label.expand(2), reduction="mean")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                truth[name] += gradient.square()
    return relative_error(sums, truth)
