"""Short runs whose reports are looked at, and a model with all that makes a checkpoint hard."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import deepclean_hooks as deepclean
from lab.planted import CLASSES, FORGET, RETAIN, TEST, WIDTH


class Tied(nn.Module):
    """A classifier with running statistics, a tied weight, and a buffer that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.again = self.first
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.again(torch.relu(self.first(x)))) * self.scale)


def unlearned(model: nn.Module, **options: Any) -> deepclean.Report:
    """A whole run with a short loop."""
    settings = {"test": TEST, "batch_size": 200, **options}
    method = deepclean.DeepClean(gamma=1.2)
    with deepclean.unlearning(
        model, forget=FORGET, retain=RETAIN, method=method, **settings
    ) as run:
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(RETAIN.tensors[0]), RETAIN.tensors[1]).backward()
            optimizer.step()
    return run.report
