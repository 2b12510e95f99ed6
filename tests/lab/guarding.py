"""A small network with planted bits, and what the tests of the guard do with it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from deepclean_hooks.stored.bits import differing
from lab.optimizers import OPTIMIZERS, Row

Masks = dict[str, Tensor]


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def data(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(n, 2, 4, 4, generator=generator)  # (N, 2, 4, 4)
    return images, torch.randint(3, (n,), generator=generator)  # (N,)


def plant(model: nn.Module, share: float = 0.3) -> Masks:
    """Free entries of every parameter but the last, which is wholly frozen; -0.0, a subnormal, +0.0
    frozen in each."""
    generator = torch.Generator().manual_seed(1)
    free = {}
    for name, parameter in model.named_parameters():
        mask = torch.rand(parameter.shape, generator=generator) < share
        line, tiny = mask.view(-1), torch.finfo(parameter.dtype).smallest_normal / 4
        line[:3] = False
        with torch.no_grad():
            at = [torch.unravel_index(torch.tensor(i), parameter.shape) for i in range(3)]
            for where, value in zip(at, (-0.0, tiny, 0.0), strict=True):
                parameter[where] = value
        free[name] = mask
    free.pop(name)
    return free


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, then: dict[str, Tensor], free: Masks, *, frozen: bool) -> int:
    """The number of frozen (or free) entries whose bits differ, counted without the guard."""
    total = 0
    for name, parameter in model.named_parameters():
        mask = free.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
        total += int((differing(parameter, then[name]) & (~mask if frozen else mask)).sum())
    return total


def loss_of(model: nn.Module) -> Tensor:
    images, labels = data()
    kind = next(model.parameters()).dtype
    return functional.cross_entropy(model(images.to(kind)).float(), labels)


def steps(
    row: Row, model: nn.Module, opts: list[optim.Optimizer], count: int, clip: float | None = None
) -> None:
    """`count` training steps with the optimizers of a row, and a switch to eval and back at the
    end."""

    def closure() -> Tensor:
        for optimizer in opts:
            optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        return loss

    for optimizer in opts if row.modes else ():
        optimizer.train()
    for _ in range(count):
        if row.closure:
            opts[0].step(closure)
        else:
            closure()
            for optimizer in opts:
                optimizer.step()
    for optimizer in opts if row.modes else ():
        optimizer.eval()


def expecting(row: Row) -> contextlib.AbstractContextManager[object]:
    if row.couples:
        return pytest.warns(UserWarning, match="couples entries")
    return contextlib.nullcontext()


def rows() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", OPTIMIZERS, ids=lambda row: row.name)


def plain(model: nn.Module) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
