"""The network and the samples that the tests of a session share."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset


def network() -> nn.Module:
    """A small convolutional network with BatchNorm, seeded, with -0.0 and a subnormal planted in
    each tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )
    for p in model.parameters():
        p.data.view(-1)[0], p.data.view(-1)[1] = -0.0, 1e-42
    return model


def samples(start: int, stop: int) -> TensorDataset:
    """Seeded samples start..stop of a fixed set of 40; x (N, 1, 6, 6), five classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 1, 6, 6, generator=generator)
    y = torch.randint(0, 5, (40,), generator=generator)
    return TensorDataset(x[start:stop], y[start:stop])


FORGET, RETAIN = samples(0, 8), samples(8, 40)
