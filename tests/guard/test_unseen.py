"""Writes to frozen entries that no step hook sees: noticed in the next backward pass, put back."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from deepclean_hooks.guard.guard import Guard, GuardError
from lab.guarding import Masks, changed, loss_of, plant, small, snapshot
from lab.hooks import hooks_on

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")

WRITTEN = "written outside the optimizer steps"


class Foreign:
    """An optimizer that is none of torch's, with weight decay; writes through `.data` if asked."""

    def __init__(self, parameters: Any, through_data: bool) -> None:
        self.parameters, self.through_data = list(parameters), through_data

    def step(self) -> None:
        with torch.no_grad():
            for p in self.parameters:
                target = p.data if self.through_data else p
                target.mul_(0.99).sub_(p.grad, alpha=0.05)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def foreign(through_data: bool) -> Callable[[nn.Module, int], None]:
    def loop(model: nn.Module, steps: int) -> None:
        optimizer = Foreign(model.parameters(), through_data)
        for _ in range(steps):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def copies_with_decay(model: nn.Module, steps: int) -> None:
    """Full-precision copies of the weights that are stepped, and copied back."""
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = optim.AdamW(masters, lr=1e-2, weight_decay=0.5)
    for _ in range(steps):
        model.zero_grad()
        loss_of(model).backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.clone()
        optimizer.step()
        for master, p in zip(masters, model.parameters(), strict=True):
            p.data.copy_(master.data)


class Clamped(nn.Linear):
    """Keeps its weights small by writing them in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.05, 0.05)
        return super().forward(x)


def clamping(model: nn.Module, steps: int) -> None:
    clamped = Clamped(5, 3)
    clamped.weight, clamped.bias = model[5].weight, model[5].bias
    model[5] = clamped
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss_of(model)  # a validation after the last step


LOOPS = {
    "no optimizer of torch's": foreign(False),
    "through .data": foreign(True),
    "copies": copies_with_decay,
    "a forward that writes": clamping,
}


@pytest.mark.parametrize("name", LOOPS)
def test_unseen_writes_are_told_at_once_and_put_back(name: str) -> None:
    """Fails if frozen entries are written for a whole run before anything is said, or end moved."""
    model = small()
    free, then = plant(model), snapshot(model)
    before = hooks_on(model)
    with Guard(model, free) as guard:
        with pytest.warns(UserWarning, match=WRITTEN):
            LOOPS[name](model, 12)
        assert guard.moved() == {}
        guard.check()
        assert any(WRITTEN in remark for remark in guard.remarks({}))
    assert changed(model, then, free, frozen=True) == 0
    assert changed(model, then, free, frozen=False)
    assert hooks_on(model) == before


def test_noticed_in_the_second_backward_pass() -> None:
    """Fails if a write in place is seen later than in the backward pass after it."""
    model = small()
    with Guard(model, plant(model)):
        optimizer = Foreign(model.parameters(), through_data=False)
        loss_of(model).backward()
        optimizer.step()
        with pytest.warns(UserWarning, match=WRITTEN):
            loss_of(model).backward()


def test_later_forward_passes_see_the_frozen_bits() -> None:
    """Fails if entries are put back at the end only: every forward pass would use others."""
    model = small()
    free, then = plant(model), snapshot(model)
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(changed(model, then, free, frozen=True))

    def loop() -> None:
        optimizer = Foreign(model.parameters(), through_data=False)
        for _ in range(5):
            hooks = [model[i].register_forward_hook(look) for i in (0, 3, 5)]
            loss_of(model).backward()
            for hook in hooks:
                hook.remove()
            optimizer.step()
            optimizer.zero_grad()

    with Guard(model, free), pytest.warns(UserWarning, match=WRITTEN):
        loop()
    assert max(seen[3:6]) > 0  # the second pass, in which they are noticed
    assert seen[8::3] == [0, 0, 0]  # at the end of each later one all have been put back


def test_written_after_the_last_backward_pass_is_an_error() -> None:
    """Fails if what could not be noticed is put back in silence: the count at the end must show
    it."""
    model = small()
    with Guard(model, plant(model)) as guard:
        loss_of(model).backward()
        Foreign(model.parameters(), through_data=False).step()
        with pytest.raises(GuardError, match=r"no optimizer step was seen.*optimizers="):
            guard.check()


def updates_by_hand(model: nn.Module) -> None:
    for _ in range(3):
        model.zero_grad()
        loss_of(model).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-0.1)


def swapped_and_swapped_back(model: nn.Module) -> None:
    """Averaged weights for a validation, then the loop's own."""
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        own = snapshot(model)
        model.load_state_dict({name: value * 0.9 for name, value in own.items()})
        with torch.no_grad():
            loss_of(model)
        model.load_state_dict(own)


def only_a_look(model: nn.Module) -> None:
    loss_of(model).backward()


@pytest.mark.parametrize("loop", [updates_by_hand, swapped_and_swapped_back, only_a_look])
def test_writes_that_leave_the_frozen_entries_are_no_error(
    loop: Callable[[nn.Module], None],
) -> None:
    """Fails if a loop without an optimizer, or that takes its writes back, is refused or told of
    frozen entries, though none has another value."""
    model = small()
    free, then = plant(model), snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Guard(model, free) as guard:
            loop(model)
            zeros = sum(
                int((p == 0)[~free.get(n, torch.zeros(p.shape, dtype=torch.bool))].sum())
                for n, p in model.named_parameters()
            )
            assert set(guard.moved().values()) <= {1}  # -0.0, to which a gradient of 0 was added
            assert zeros >= 2
    assert all(
        torch.equal(p[~free[n]], then[n][~free[n]])
        for n, p in model.named_parameters()
        if n in free
    )


def test_copies_of_a_watched_model_are_free() -> None:
    """Fails if a copy made after writes were noticed cannot be pickled, or writes the original."""
    model = small()
    free: Masks = plant(model)
    with Guard(model, free):
        with pytest.warns(UserWarning, match=WRITTEN):
            foreign(False)(model, 3)
        stored = io.BytesIO()
        torch.save(model, stored)
        loaded = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
        for made in (copy.deepcopy(model), loaded):
            there, here = snapshot(made), snapshot(model)
            loss_of(made)
            assert all(torch.equal(there[n], p) for n, p in made.named_parameters())
            assert all(torch.equal(here[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_rescaling_tables_are_refused_by_name(layer: Callable[..., nn.Module]) -> None:
    """Fails if a table that rescales its rows in each forward pass is guarded: none would hold."""
    model = nn.Sequential(layer(4, 3, max_norm=1.0), nn.Linear(3, 2))
    before = hooks_on(model)
    with pytest.raises(ValueError, match=r"0 \(max_norm=1\.0\); set their max_norm to None"):
        Guard(model, {})
    assert hooks_on(model) == before
    model[0].max_norm = None
    Guard(model, {}).release()
