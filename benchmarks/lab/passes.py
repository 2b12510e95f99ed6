"""The two passes over batches that are compared: a plain one and the exact Fisher diagonal's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from benchmarks.lab.models import Batches
from deepclean_hooks.data.losses import cross_entropy
from deepclean_hooks.persample.engine import SquaredGradients
from deepclean_hooks.persample.loop import squared_gradients

MIB = 2**20


def plain(model: nn.Module, batches: Batches) -> None:
    """Forward and backward of each batch, gradients dropped in between: what an epoch costs without
    its steps."""
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=True)


def exact(engine: SquaredGradients, batches: Batches) -> None:
    """The squared gradients of every sample, summed."""
    for batch in batches:
        engine.add(batch)
    engine.totals()


def one_at_a_time(model: nn.Module, parameters: dict[str, nn.Parameter], batches: Batches) -> None:
    """The same by autograd, one sample after the other."""
    for batch in batches:
        squared_gradients(model, parameters, cross_entropy, batch)
