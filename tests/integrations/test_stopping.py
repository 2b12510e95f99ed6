"""`unlearn(..., stop=WhenForgotten(...))`: it ends when there is nothing more to forget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepclean_hooks as deepclean
from deepclean_hooks.testing import held_out, network, sets

OPTIONS: dict[str, Any] = {"scores": False, "progress": False, "batch_size": 10}


def unlearned(stop: deepclean.WhenForgotten, **options: Any) -> deepclean.Report:
    """A run of at most 12 steps."""
    forget, retain = sets()
    method = options.pop("method", deepclean.FineTune())
    settings = {**OPTIONS, "steps": 12, **options}
    return deepclean.unlearn(original(), forget, retain, method=method, stop=stop, **settings)


def original() -> nn.Module:
    """The checks' network, trained on the retain set alone: D_f is unseen to it."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = sets()[1].tensors
    for _ in range(40):
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_it_ends_at_the_first_look_that_finds_nothing() -> None:
    """Fails if a run goes on though nothing tells D_f from unseen data, or ends between looks."""
    report = unlearned(deepclean.WhenForgotten(held_out(), every=5, retain_points=100.0))
    assert report.optimizer_steps == 5
    assert not report.warnings


def test_it_goes_on_until_the_retain_set_is_back() -> None:
    """Fails if a run ends though it has harmed D_r, or one that never ended says nothing."""
    kind = deepclean.WhenForgotten(held_out(), every=5, retain_points=1e-9)
    with pytest.warns(UserWarning, match="did not end by stop=: after 10 steps the forget set"):
        report = unlearned(kind, optimizer=lambda ps: torch.optim.Adam(ps, lr=1.0, maximize=True))
    assert report.optimizer_steps == 12
    assert any("retain accuracy" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop": 3}, TypeError, r"stop must be WhenForgotten\(held_out\), got 3"),
        ({"method": deepclean.SCRUB(), "steps": None}, ValueError, "neither steps= nor stop="),
        ({"resume": {}}, ValueError, "leave stop= out"),
    ],
)
def test_what_cannot_be_stopped_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Fails if a setting is taken that can have no effect."""
    stop = options.pop("stop", deepclean.WhenForgotten(held_out()))
    with pytest.raises(error, match=message):
        unlearned(stop, **options)


@pytest.mark.parametrize("name", ["every", "retain_points"])
def test_bad_settings_are_refused(name: str) -> None:
    """Fails if a run could never be looked at."""
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got 0"):
        deepclean.WhenForgotten(held_out(), **{name: 0})
