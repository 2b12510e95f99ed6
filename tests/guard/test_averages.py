"""Averages of a model from before the reset: found, said, and refreshed."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm.utils
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.guard.guard import Guard
from lab.guarding import Masks, loss_of, plant, small

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")


@pytest.fixture(autouse=True)
def _no_averages_of_other_tests() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


class ShadowEMA:
    """As it is often written by hand: a dict of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 0.1)


class ListEMA:
    """As torch_ema and diffusers keep it: a list in the order of the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow_params = [p.detach().clone() for p in model.parameters()]

    def update(self, model: nn.Module) -> None:
        for shadow, p in zip(self.shadow_params, model.parameters(), strict=True):
            shadow.lerp_(p.detach(), 0.1)


class Callback:
    """As a Lightning callback holds it."""

    def __init__(self, model: nn.Module) -> None:
        self._average_model = AveragedModel(model)

    def update(self, model: nn.Module) -> None:
        self._average_model.update_parameters(model)


class Around(nn.Module):
    """The model inside another one, as in a LightningModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model


def averaged(model: nn.Module) -> AveragedModel:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    average.update_parameters(model)
    return average


def of_a_wrapper(model: nn.Module) -> AveragedModel:
    return AveragedModel(Around(model))


MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel": averaged,
    "AveragedModel of a wrapper": of_a_wrapper,
    "in a callback": Callback,
    "timm ModelEma": lambda model: timm.utils.ModelEma(model, decay=0.9),
    "timm ModelEmaV2": lambda model: timm.utils.ModelEmaV2(model, decay=0.9),
    "timm ModelEmaV3": lambda model: timm.utils.ModelEmaV3(model, decay=0.9),
    "a dict of tensors": ShadowEMA,
    "a list of tensors": ListEMA,
}


def tensors(average: Any) -> dict[str, Tensor]:
    """The copies, by another route than the package's: whatever has the shapes, in order."""
    names = [name for name, _ in small().named_parameters()]
    if isinstance(average, ShadowEMA):
        return average.shadow
    if isinstance(average, ListEMA):
        return dict(zip(names, average.shadow_params, strict=True))
    inside = average._average_model if isinstance(average, Callback) else average
    module = inside.ema if hasattr(inside, "ema") else inside.module
    return dict(zip(names, module.parameters(), strict=True))


def reset(model: nn.Module) -> Masks:
    free = plant(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in free:
                p[free[name]] = 0.0
    return free


@pytest.mark.parametrize("name", MAKE)
def test_averages_from_before_are_found_and_refreshed(name: str) -> None:
    """Fails if an average that keeps what is to be forgotten is not named, or a refreshed one still
    has it after an update."""
    model = small()
    average = MAKE[name](model)
    free = reset(model)
    kept = sum(int(tensors(average)[n][mask].ne(0).sum()) for n, mask in free.items())
    assert kept > 50
    with Guard(model, free) as guard:
        (said,) = guard.watch_averages(free)
        assert said.startswith(f"{type(average).__name__ if 'callback' not in name else ''}")
        assert "run.refresh(average)" in said
        guard.refresh(average)
        assert guard.watch_averages(free) == []
        for n, p in model.named_parameters():
            assert torch.equal(tensors(average)[n], p)
        update = average.update_parameters if isinstance(average, AveragedModel) else average.update
        update(Around(model) if "wrapper" in name else model)
    for n, mask in free.items():
        assert not tensors(average)[n][mask].any()


def test_a_refreshed_average_begins_anew() -> None:
    """Fails if weights of before the reset count on as averaged models: the reset ones would weigh
    as much as they did."""
    model = small()
    average = AveragedModel(model)
    for _ in range(50):
        average.update_parameters(model)
    free = reset(model)
    with Guard(model, free) as guard:
        guard.refresh(average)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update_parameters(model)
    for kept, p in zip(average.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(kept, p)


def test_averages_that_keep_nothing_are_not_said() -> None:
    """Fails if an average made after the reset, one of another model, or a class with a similar
    name raises a warning."""

    class Schema:
        def __init__(self) -> None:
            self.tensors = [p.detach().clone() for p in small().parameters()]

    class AverageMeter:
        def __init__(self) -> None:
            self.values, self.name = [torch.ones(3)], "loss"

    model = small()
    kept = [Schema(), AverageMeter(), AveragedModel(nn.Linear(2, 2)), copy.deepcopy(model)]
    free = reset(model)
    kept.append(AveragedModel(model))
    with Guard(model, free) as guard:
        assert guard.watch_averages(free) == []
    assert len(kept) == 5


@pytest.mark.parametrize("moves", [True, False])
def test_a_plain_copy_that_moves_is_said_at_the_end(moves: bool) -> None:
    """Fails if an average made by hand passes, or the original kept for comparison is taken for
    one."""
    model = small()
    average = copy.deepcopy(model)
    free = reset(model)
    counts = {name: int(mask.sum()) for name, mask in free.items()}
    with Guard(model, free) as guard:
        assert guard.watch_averages(free) == []
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss_of(model).backward()
            optimizer.step()
            with torch.no_grad():
                for kept, p in zip(average.parameters(), model.parameters(), strict=True):
                    if moves:
                        kept.lerp_(p, 0.1)
        said = [remark for remark in guard.remarks(counts) if "copy of this model" in remark]
    assert len(said) == moves


def test_what_is_no_average_is_refused() -> None:
    """Fails if refresh() writes into an object of other shapes, or into the model itself."""
    model = small()
    with Guard(model, {}) as guard:
        for wrong in (nn.Linear(3, 2), object(), [1, 2], model):
            with pytest.raises(ValueError, match="holds no copy of this model"):
                guard.refresh(wrong)


def test_a_session_says_and_refreshes() -> None:
    """Fails if the report does not name an average from before, or run.refresh() does not exist."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(30, 4), torch.arange(30) % 3)
    forget, retain = (torch.utils.data.Subset(data, part) for part in (range(9), range(9, 30)))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    quiet = {"scores": False, "progress": False, "dead_count": False}
    run = deepclean.Session(model, deepclean.DeepClean(gamma=1.1), **quiet)
    run.measure(forget, retain)
    run.select()
    run.reset()
    with pytest.raises(RuntimeError, match="refresh"):
        run.refresh(average)
    with pytest.warns(UserWarning, match="ModelEmaV3 averages this model since before the reset"):
        run.guard()
    run.refresh(average)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    optimizer.step()
    average.update(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run.finish()
    assert sum("ModelEmaV3" in warning for warning in report.warnings) == 1
    for name, mask in run.selection.masks.items():
        now, kept = model.get_parameter(name), average.module.get_parameter(name)
        torch.testing.assert_close(kept[mask], 0.1 * now[mask])  # nothing of before
