"""A small network, with data to forget, to retain and to hold out: `check_method` runs on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CLASSES = 4


class Net(nn.Module):
    """A convolution, BatchNorm and two linear layers for 6 x 6 images, seeded, off its initial
    values, with -0.0 and a subnormal in each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(96, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) of images (N, 1, 6, 6)."""
        x = self.norm(self.conv(x)).relu().flatten(1)
        logits: Tensor = self.head(self.hidden(x).relu())
        return logits


def network(dtype: torch.dtype = torch.float32) -> Net:
    """The model that the checks run on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
                p.view(-1)[0], p.view(-1)[1] = -0.0, 1e-42
            model.norm.running_mean = torch.randn(6) * 0.2
    return model.to(dtype)


def sets(dtype: torch.dtype = torch.float32) -> tuple[TensorDataset, TensorDataset]:
    """The 10 samples of class 0, which are to be forgotten, and 30 of the other classes."""
    x, y = _samples(dtype)
    return TensorDataset(x[y == 0], y[y == 0]), TensorDataset(x[y != 0], y[y != 0])


def held_out(dtype: torch.dtype = torch.float32) -> TensorDataset:
    """12 samples of all classes that are in neither set."""
    x, y = _samples(dtype, 52)
    return TensorDataset(x[40:], y[40:])


def _samples(dtype: torch.dtype, count: int = 40) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    y = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, 1, 6, 6, generator=random)
    x = [torch.randn(1, 6, 6, generator=random) for _ in range(count)]
    return (torch.stack(x) + centres[y]).to(dtype), y
