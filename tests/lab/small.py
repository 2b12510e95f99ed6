"""The small network and the seeded samples that most tests take."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

CLASSES, SIZE = 5, 6


def network(
    width: int = 4, dtype: torch.dtype = torch.float32, *, planted: bool = False
) -> nn.Sequential:
    """A convolution with BatchNorm for images (N, 1, 6, 6), the same at every call; `planted`: with
    -0.0 and a subnormal in each parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, CLASSES),
    )
    for p in model.parameters() if planted else ():
        p.data.view(-1)[0], p.data.view(-1)[1] = -0.0, 1e-42
    return model.to(dtype)


def samples(
    start: int, stop: int, dtype: torch.dtype = torch.float32, *, of: int = 40
) -> TensorDataset:
    """Samples start..stop of a fixed set of `of`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(of, 1, SIZE, SIZE, generator=generator)
    y = torch.randint(0, CLASSES, (of,), generator=generator)
    return TensorDataset(x[start:stop].to(dtype), y[start:stop])
