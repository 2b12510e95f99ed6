"""The hooks of a guard: layers unfrozen later, compiled training steps, threads, aborted steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deepclean_hooks.guard.guard import Guard
from lab.guarding import changed, data, loss_of, plain, plant, small, snapshot
from lab.hooks import hooks_of_torch

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")


@pytest.mark.parametrize("when", ["before the loop", "after a step", "frozen and unfrozen again"])
def test_a_layer_unfrozen_in_the_loop_is_masked(when: str) -> None:
    """Fails if gradients are masked only where they were asked for when the guard was set: then
    frozen entries take part in clipping."""
    model = small()
    free, then = plant(model), snapshot(model)
    late = model[3]
    late.requires_grad_(when == "frozen and unfrozen again")
    with Guard(model, free) as guard:
        assert late.weight.requires_grad == (when == "frozen and unfrozen again")
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        if when != "before the loop":
            late.requires_grad_(False)
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        late.requires_grad_(True)
        loss_of(model).backward()
        for name, p in model.named_parameters():
            assert not p.grad[~free.get(name, torch.zeros(p.shape, dtype=torch.bool))].any()
        assert late.weight.grad[free["3.weight"]].any()
        optimizer.step()
        guard.check()
    assert changed(model, then, free, frozen=True) == 0


def test_weights_of_integers_are_left_alone() -> None:
    """Fails if a hook is asked for where torch knows no gradient (quantised weights)."""
    model = nn.Linear(2, 2)
    model.table = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with Guard(model, {}) as guard:
        model.table[0] = 2
        assert guard.moved() == {"table": 1}


# torch.compile itself reads the gradient of the loss.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_compiled_training_step_works(backend: str, closure: bool) -> None:
    """Fails if torch.compile traces the guard's hooks: their writes through views cannot be."""
    model = small()
    free, then = plant(model), snapshot(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    images, labels = data()

    def step(x: Tensor, y: Tensor) -> None:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()

    compiled = torch.compile(step, backend=backend)
    with Guard(model, free) as guard:
        for _ in range(2):
            compiled(images, labels)
        guard.check()
        assert guard.steps == 2
    assert changed(model, then, free, frozen=True) == 0
    assert changed(model, then, free, frozen=False)


def test_guards_in_two_threads() -> None:
    """Fails if a guard that begins or ends in another thread, while torch walks its hooks for a
    step, makes that step fail, or takes the other guard's hooks away."""
    model, before = small(), hooks_of_torch()
    free, then = plant(model), snapshot(model)
    errors: list[BaseException] = []
    inside, gone = threading.Event(), threading.Event()

    def come_and_go() -> None:
        try:
            inside.wait(30)
            with Guard(small(1), {}) as guard:
                plain(guard._model)
                assert guard.steps == 3
        except BaseException as error:
            errors.append(error)
        finally:
            gone.set()

    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def wait(stepping: optim.Optimizer, *_: Any) -> None:
        if stepping is optimizer:
            inside.set()
            gone.wait(30)

    thread = threading.Thread(target=come_and_go)
    with Guard(model, free) as guard:
        # Global too: torch is walking its registry while the other guard comes and goes.
        handles = [register_optimizer_step_pre_hook(hook) for hook in (wait, lambda *_: None)]
        thread.start()
        loss_of(model).backward()
        optimizer.step()
        thread.join()
        for handle in handles:
            handle.remove()
        guard.check()
        assert guard.steps == 1
    assert not errors
    assert hooks_of_torch() == before
    assert changed(model, then, free, frozen=True) == 0


def test_two_threads_cannot_guard_a_model_at_once() -> None:
    """Fails if two guards that are set at the same moment both take the model."""
    model = small()
    start, taken = threading.Barrier(4), []

    def take() -> None:
        start.wait(30)
        try:
            taken.append(Guard(model, {}))
        except RuntimeError:
            taken.append(None)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    guards = [guard for guard in taken if guard is not None]
    assert len(guards) == 1
    guards[0].release()


def broken(optimizer: optim.Optimizer, write: Callable[[nn.Parameter], None]) -> None:
    """Has a step write the first parameters, then fail."""

    class Breaks(type(optimizer)):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                for p in self.param_groups[0]["params"][:3]:
                    write(p)
            raise MemoryError("half-way")

    optimizer.__class__ = Breaks
    optimizer._patch_step_function()


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_aborted_step_is_put_right(goes_on: bool) -> None:
    """Fails if a step that raises half-way leaves frozen entries moved when the guard is released,
    or the gradients that were hidden for its length are lost."""
    model = small()
    free, then = plant(model), snapshot(model)
    kind = optim.SGD
    optimizer = kind(model.parameters(), lr=0.1)
    with Guard(model, free) as guard:
        loss_of(model).backward()
        optimizer.step()  # gradients are hidden from the second step on
        broken(optimizer, lambda p: p.mul_(0.9))
        with pytest.raises(MemoryError):
            optimizer.step()
        if goes_on:
            optimizer.__class__ = kind
            optimizer.step()
            guard.check()
            assert guard.steps == 2
    assert changed(model, then, free, frozen=True) == 0
    assert model[5].bias.grad is not None
