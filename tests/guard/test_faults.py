"""A guarded loop that is aborted anywhere leaves nothing behind and no frozen entry moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn import functional
from torch.utils.data import TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.guard.guard import Guard
from lab import faults
from lab.guarding import Masks, changed, data, loss_of, plant, small, snapshot

SEED = 18


def plain(model: nn.Module, guard: Guard, optimizer: optim.Optimizer) -> None:
    for _ in range(3):
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def closure(model: nn.Module, guard: Guard, optimizer: optim.Optimizer) -> None:
    def evaluate() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(evaluate)


def accumulated(model: nn.Module, guard: Guard, optimizer: optim.Optimizer) -> None:
    for micro in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        if micro % 2:
            optimizer.step()
            optimizer.zero_grad()


def compact(model: nn.Module, guard: Guard, optimizer: optim.Optimizer) -> None:
    leaves = guard.compact()
    optimizer = optim.AdamW(leaves.values(), lr=1e-2)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def normed() -> nn.Sequential:
    model = small()
    model[1] = nn.BatchNorm2d(4)
    return model


Loop = Callable[[nn.Module, Guard, optim.Optimizer], None]
MAKE_OPTIMIZER: dict[str, Callable[..., optim.Optimizer]] = {
    "AdamW": lambda ps: optim.AdamW(ps, lr=1e-2, weight_decay=0.5, foreach=False),
    "SGD": lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "LBFGS": lambda ps: optim.LBFGS(ps, max_iter=3),
}
LOOPS: list[tuple[str, Loop, str, dict[str, Any]]] = [
    ("plain AdamW", plain, "AdamW", {}),
    ("plain SGD", plain, "SGD", {}),
    ("closure", closure, "LBFGS", {}),
    ("accumulated, autocast", accumulated, "SGD", {}),
    ("compact", compact, "SGD", {}),
    ("norm statistics frozen", plain, "AdamW", {"norm_statistics": "freeze"}),
]


def maker(loop: Loop, kind: str, options: dict[str, Any]) -> faults.Make:
    def make() -> faults.Scene:
        model = normed()
        free, then = plant(model), snapshot(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # what a loop had before, and may read afterwards
        optimizer = MAKE_OPTIMIZER[kind](model.parameters())

        def run() -> None:
            with Guard(model, free, optimizers=[optimizer], **options) as guard:
                loop(model, guard, optimizer)

        def check() -> None:
            assert changed(model, then, free, frozen=True) == 0
            if kind == "AdamW":
                assert all(p.grad is not None for p in model.parameters())

        return faults.Scene(model, run, [optimizer], check)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("error", [faults.Fault, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(("name", "loop", "kind", "options"), LOOPS, ids=[row[0] for row in LOOPS])
def test_nothing_is_left_behind(
    name: str, loop: Loop, kind: str, options: dict[str, Any], error: type[BaseException]
) -> None:
    """Fails if a hook, a mode, a flag, a hidden gradient or a half-made step outlives an abort at
    any of 40 random operations of the loop, the guard's own among them."""
    make = maker(loop, kind, options)
    for at in faults.points(make, 40, SEED):
        assert faults.aborted(make, at, error) == [], f"{name}, operation {at}"


def whole_run() -> faults.Make:
    """A session around a loop; the check compares with the masks of a run without a fault."""
    images, labels = torch.randn(30, 2, 4, 4), torch.arange(30) % 3
    sets = {
        "forget": TensorDataset(images[:8], labels[:8]),
        "retain": TensorDataset(images[8:], labels[8:]),
    }
    masks: Masks = {}

    def make() -> faults.Scene:
        model = normed()
        then, optimizer = snapshot(model), optim.AdamW(model.parameters(), lr=1e-2)

        def run() -> None:
            options = {"progress": False, "batch_size": 7, "method": deepclean.DeepClean(gamma=1.1)}
            with deepclean.unlearning(model, **sets, **options) as session:
                masks.update(session.selection.masks)
                for part in (slice(8, 19), slice(19, 30)):
                    functional.cross_entropy(model(images[part]), labels[part]).backward()
                    optimizer.step()
                    optimizer.zero_grad()

        def check() -> None:
            assert changed(model, then, masks, frozen=True) == 0

        return faults.Scene(model, run, [optimizer], check)

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*reset entries are dead:UserWarning")
def test_a_whole_run_leaves_nothing_behind() -> None:
    """Fails if an abort in any phase of a session, from the scores before to those after, leaves a
    trace or moves a weight outside W_f. An interrupt: what fails while scoring is reported, and
    what fails in a probe sends its layer to the loop."""
    torch.manual_seed(0)
    make = whole_run()
    for at in faults.points(make, 60, SEED):
        assert faults.aborted(make, at, KeyboardInterrupt) == [], f"operation {at}"


@pytest.mark.parametrize("share", [0.05, 0.4, 0.7, 0.98])
def test_an_abort_early_and_late(share: float) -> None:
    """The same at four points, in every run of the tests."""
    make = maker(plain, "AdamW", {"norm_statistics": "freeze"})
    at = int(share * faults.operations(make))
    assert faults.aborted(make, at) == []


def test_the_harness_sees_what_is_left() -> None:
    """Fails if a hook, a mode or random numbers that a run leaves would pass unseen."""

    def leaving(leave: Callable[[nn.Module], object]) -> faults.Make:
        def make() -> faults.Scene:
            model = small()

            def run() -> None:
                leave(model)
                model(data()[0])

            return faults.Scene(model, run)

        return make

    kept: list[Any] = []
    leaves: dict[str, Callable[[nn.Module], object]] = {
        "module 0: _forward_hooks": lambda m: m[0].register_forward_hook(lambda *_: None),
        "module 3: mode": lambda m: m[3].eval(),
        "module 3: attributes": lambda m: setattr(m[3], "note", 1),
        "parameter 0.weight: requires_grad": lambda m: m[0].weight.requires_grad_(False),
        "random: torch": lambda m: torch.manual_seed(5),
        "global: guarded parameters": lambda m: kept.append(Guard(m, {})),
    }
    for name, leave in leaves.items():
        make = leaving(leave)
        assert name in faults.aborted(make, faults.operations(make))
        if kept:
            kept.pop().release()
