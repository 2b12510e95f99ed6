"""What is added to gradients before a step: once a step, masked, seen by the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from deepclean_hooks.guard.guard import Guard
from lab.guarding import changed, expecting, loss_of, plant, rows, small, snapshot, steps
from lab.optimizers import Row, build

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")


def penalty(model: nn.Module) -> Tensor:
    return 0.01 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


class Adds:
    """Adds the gradient of a penalty to what is stepped; remembers its calls."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, []

    def __call__(self, optimizer: Any, stepped: Mapping[str, Tensor], again: bool) -> None:
        self.calls.append((sorted(stepped), again))
        penalty(self.model).backward()


@rows()
def test_once_a_step_under_every_optimizer(row: Row) -> None:
    """Fails if an optimizer inside another has it added twice, or one that hooks do not see not at
    all, or what was added moves a frozen entry."""
    model = small()
    free, then = plant(model), snapshot(model)
    adds = Adds(model)
    opts = build(row, model)
    with expecting(row), Guard(model, free, optimizers=opts, before_step=adds) as guard:
        steps(row, model, opts, 8)
        assert guard.steps == 8 * len(opts)
        assert len([again for _, again in adds.calls if not again]) == guard.steps
        guard.check()
    assert not changed(model, then, free, frozen=True)
    assert changed(model, then, free, frozen=False)


def test_what_is_added_is_part_of_the_step() -> None:
    """Fails if the added gradient comes after the optimizer read the others, or only in part: the
    same penalty inside the loss must end in the same weights, in a closure too."""
    ends = []
    for how in ("in the loss", "added", "added in a closure"):
        model = small().double()
        free = plant(model)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        adds = None if how == "in the loss" else Adds(model)
        with Guard(model, free, before_step=adds):
            for _ in range(3):

                def closure(
                    model: nn.Module = model, optimizer: Any = optimizer, how: str = how
                ) -> Tensor:
                    optimizer.zero_grad()
                    loss = loss_of(model)
                    if how == "in the loss":
                        loss = loss + penalty(model)
                    loss.backward()
                    return loss

                if how == "added in a closure":
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        ends.append(snapshot(model))
    for end in ends[1:]:
        for name, tensor in ends[0].items():
            torch.testing.assert_close(tensor, end[name], rtol=1e-12, atol=1e-14)


def test_two_optimizers_see_their_own_tensors() -> None:
    """Fails if the tensors that are named are those of another optimizer."""
    model = small()
    adds = Adds(model)
    first = optim.SGD(model[0].parameters(), lr=0.1)
    rest = optim.SGD([*model[3].parameters(), *model[5].parameters()], lr=0.1)
    with Guard(model, plant(model), before_step=adds):
        loss_of(model).backward()
        first.step()
        rest.step()
    assert [names for names, _ in adds.calls] == [
        ["0.bias", "0.weight"],
        ["3.bias", "3.weight", "5.bias", "5.weight"],
    ]


def test_a_closure_called_again_is_the_same_step() -> None:
    """Fails if an optimizer that evaluates several times a step is told of a new step each time."""
    model = small()
    adds = Adds(model)
    with Guard(model, plant(model), before_step=adds) as guard:
        optimizer = optim.LBFGS(model.parameters(), max_iter=3)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert guard.steps == 1
    assert [again for _, again in adds.calls] == [False] + [True] * (len(adds.calls) - 1)
    assert len(adds.calls) > 1


def test_what_is_added_goes_to_compact_leaves() -> None:
    """Fails if the leaves of compact() are stepped without what was added."""
    ends = []
    for added in (True, False):
        model = small()
        free = plant(model)
        with Guard(model, free, before_step=Adds(model) if added else None) as guard:
            optimizer = optim.SGD(guard.compact().values(), lr=0.1)
            loss = loss_of(model)
            (loss if added else loss + penalty(model)).backward()
            optimizer.step()
        ends.append(snapshot(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name])


def test_a_closure_that_hooks_cannot_see_is_refused() -> None:
    """Fails if nothing is added to a step whose gradients come after it began."""

    class Own:
        def __init__(self, parameters: Any) -> None:
            self.param_groups, self.state, self.defaults = [{"params": list(parameters)}], {}, {}

        def step(self, closure: Any = None) -> None:
            closure()

    model = small()
    optimizer: Any = Own(model.parameters())
    with (
        Guard(model, plant(model), optimizers=[optimizer], before_step=Adds(model)),
        pytest.raises(RuntimeError, match=r"Own computes gradients in a closure.*backward"),
    ):
        optimizer.step(lambda: loss_of(model).backward())
