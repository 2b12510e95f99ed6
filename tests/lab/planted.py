"""Planted cases: classifiers trained until they know random labels by heart."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

CLASSES, WIDTH = 10, 30


def drawn(count: int, seed: int) -> TensorDataset:
    """Points with random labels: nothing to learn but the samples themselves."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


FORGET, RETAIN, TEST = drawn(150, 1), drawn(450, 2), drawn(2400, 3)
SETS = {"forget": FORGET, "retain": RETAIN, "test": TEST}


def joined(*parts: TensorDataset) -> TensorDataset:
    return TensorDataset(*(torch.cat([p.tensors[i] for p in parts]) for i in range(2)))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, CLASSES))


@torch.enable_grad()
def fitted(data: TensorDataset, seed: int, steps: int = 150) -> nn.Module:
    """Full-batch Adam until the training loss is next to nothing."""
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    return model


@functools.cache
def original(seed: int = 0) -> nn.Module:
    """Trained with the forget set."""
    return fitted(joined(FORGET, RETAIN), seed)


@functools.cache
def gold(seed: int = 10) -> nn.Module:
    """A true retrain: never saw the forget set."""
    return fitted(RETAIN, seed)
