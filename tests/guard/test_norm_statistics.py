"""Running statistics of normalisation layers: frozen bit for bit, or left to the loop."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn, optim
from torch.utils.data import Subset, TensorDataset

from deepclean_hooks import DeepClean, Session
from deepclean_hooks.guard.guard import Guard, GuardError
from deepclean_hooks.options import Options
from lab.guarding import (
    data,
)

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten())


@pytest.mark.parametrize("compile_it", [False, True])
def test_norm_statistics_freeze_and_update(compile_it: bool) -> None:
    """Fails if model.train() wakes a frozen norm, or a graph compiled before the guard or in it
    outlives it."""
    for policy in ("update", "freeze"):
        model = normed()
        run = torch.compile(model, backend="aot_eager") if compile_it else model
        run(data()[0])
        then = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with Guard(model, {}, norm_statistics=policy) as guard:
            optimizer = optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                model.train()
                run(data()[0]).square().mean().backward()
                optimizer.step()
                assert all(module.training for module in model.modules())
            guard.check()
        moved = {n for n, b in model.named_buffers() if not torch.equal(b, then[n])}
        wanted = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
        assert moved == (wanted if policy == "update" else set())
        seen = int(model[1].num_batches_tracked)
        run(data()[0])  # after release
        assert int(model[1].num_batches_tracked) == seen + 1


def test_norm_statistics_written_otherwise_are_counted() -> None:
    """Fails if moved() looks at parameters only, or a forward that raises leaves a norm in eval
    mode."""
    model = normed()
    with Guard(model, {}, norm_statistics="freeze") as guard:
        with pytest.raises(RuntimeError):
            model[1](torch.zeros(2, 7, 3, 3))
        assert model[1].training
        model[1].running_mean[0] = 5.0
        assert guard.moved() == {"1.running_mean": 1}
        with pytest.raises(GuardError, match=r"1\.running_mean \(1\)"):
            guard.check()


def test_copies_of_a_frozen_norm_are_free() -> None:
    """Fails if a model copied or saved inside the guard cannot be pickled, or stays frozen for
    ever."""
    model = normed()
    with Guard(model, {}, norm_statistics="freeze"):
        stored = io.BytesIO()
        torch.save(model, stored)
        copies = [
            copy.deepcopy(model),
            torch.load(io.BytesIO(stored.getvalue()), weights_only=False),
        ]
        for other in copies:
            other(data()[0])
            assert other[1].num_batches_tracked == 1
        model(data()[0])
        assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize(("parameters", "expected"), [("3.bias", "freeze"), ("*", "update")])
def test_default_follows_how_much_may_train(parameters: str, expected: str) -> None:
    """Fails if a handful of free weights lets the loop move the statistics of the whole network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3))
    samples = TensorDataset(torch.randn(40, 20), torch.arange(40) % 3)
    method = DeepClean(gamma=1e-6, one_dimensional=True, parameters=parameters)
    for given in (None, "update"):
        options: Options = {"scores": False, "progress": False, "norm_statistics": given}
        run = Session(model, method, **options).measure(
            Subset(samples, range(20)), Subset(samples, range(20, 40))
        )
        assert run.select().norm_statistics == (expected if given is None else given)
