"""The guard itself: what it detects, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn, optim

from deepclean_hooks.guard.guard import Guard, GuardError
from lab.guarding import Masks, changed, loss_of, plain, plant, small, snapshot
from lab.hooks import hooks_of_torch, hooks_on

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")


def test_replaced_parameter_is_detected() -> None:
    """Fails if a parameter set anew by setattr trains past the guard in silence (4.0e-3 was
    measured)."""
    model = small()
    free = plant(model)
    with Guard(model, free) as guard:
        model[3].weight = nn.Parameter(model[3].weight.detach().clone())
        plain(model)
        assert set(guard.moved()) == {"3.weight"}
        with pytest.raises(GuardError, match=r"3\.weight \(\d+\); replaced by other objects.*set"):
            guard.check()


def test_step_on_the_instance_is_detected_and_followed_when_passed() -> None:
    """Fails if an optimizer that the hooks cannot see moves entries in silence, or the way out does
    not work."""
    for passed in (False, True):
        model = small()
        free = plant(model)
        optimizer = optim.SGD(model.parameters(), lr=0.1)

        def step(model: nn.Module = model) -> None:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)

        optimizer.step = step
        with Guard(model, free, optimizers=[optimizer] if passed else ()) as guard:
            loss_of(model).backward()
            optimizer.step()
            if passed:
                guard.check()
                assert guard.steps == 1
            else:
                with pytest.raises(GuardError, match=r"no optimizer step was seen.*optimizers="):
                    guard.check()
        assert optimizer.step is step


def test_write_outside_a_step_is_detected() -> None:
    """Fails if moved() counts other than bits: +0.0 over -0.0 is one entry."""
    model = small()
    free = plant(model)
    with Guard(model, free) as guard:
        plain(model)
        with torch.no_grad():
            model[5].bias[0] = 0.0
        assert guard.moved() == {"5.bias": 1}
        with pytest.raises(GuardError, match=r"1 frozen entries moved: 5\.bias \(1\).*load_state"):
            guard.check()


def test_conversion_is_refused() -> None:
    """Fails if float32 bits are written over a model that became half."""
    model = small()
    free = plant(model)
    with Guard(model, free) as guard:
        model.bfloat16()
        with pytest.raises(GuardError, match=r"torch\.float32 .* torch\.bfloat16 .* now; convert"):
            plain(model)
        assert guard.moved()["5.bias"] == 3


@pytest.mark.parametrize(
    ("free", "said"),
    [
        ({"9.weight": torch.ones(3, dtype=torch.bool)}, r"9\.weight: no such parameter"),
        ({"5.bias": torch.ones(4, dtype=torch.bool)}, r"5\.bias: shape \(4,\), not \(3,\)"),
        ({"5.bias": torch.ones(3)}, r"5\.bias: torch\.float32, not torch\.bool"),
    ],
)
def test_masks_that_do_not_fit_are_refused(free: Masks, said: str) -> None:
    """Fails if a misspelt name freezes a parameter in silence, or an error leaves a hook."""
    with pytest.raises(ValueError, match=said):
        Guard(small(), free)


def test_unknown_policy_and_width_are_refused() -> None:
    """Fails if a misspelt policy means 'update', or a 16-byte dtype fails only at the first
    step."""
    with pytest.raises(ValueError, match=r"\('update', 'freeze'\), got 'frozen'"):
        Guard(small(), {}, norm_statistics="frozen")
    with pytest.raises(ValueError, match=r"weight: torch\.complex128"):
        Guard(nn.Linear(2, 2, dtype=torch.complex128), {})


def test_nested_guard_is_refused_until_release() -> None:
    """Fails if two guards mix their masks on one model, or on one shared parameter."""
    model = small()
    free = plant(model)
    around = nn.ModuleList([model[5], nn.Linear(2, 2)])
    with Guard(model, free):
        for other, masks in ((model, free), (around, {})):
            with pytest.raises(RuntimeError, match=r"another guard: .*release\(\)"):
                Guard(other, masks)
    Guard(around, {}).release()


def test_release_and_exceptions_leave_no_hook() -> None:
    """Fails if an exception, KeyboardInterrupt included, or a second release leaves a hook or a
    wrapped method."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    before, globally = hooks_on(model), hooks_of_torch()
    guard = Guard(model, {}, norm_statistics="freeze")
    assert hooks_on(model) != before

    def interrupted() -> None:
        with guard:
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    guard.release()
    assert hooks_on(model) == before
    assert hooks_of_torch() == globally
    assert "step" not in vars(optimizer)
    then = snapshot(model)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    assert changed(model, then, {}, frozen=True)
    with pytest.raises(RuntimeError, match="before release"):
        guard.moved()


def test_failure_while_being_set_leaves_no_hook() -> None:
    """Fails if an optimizer that cannot be followed leaves half a guard behind."""
    model = small()
    before = hooks_on(model)
    with pytest.raises(TypeError):
        Guard(model, {}, optimizers=[object()])
    assert hooks_on(model) == before
    Guard(model, {}).release()


def test_forgotten_guard_releases_itself() -> None:
    """Fails if a hook keeps its guard alive, or a dead guard's ids overwrite new parameters (15 of
    30 were)."""
    model = small()
    free, before = plant(model), hooks_on(model)
    guard = Guard(model, free)
    plain(model)
    del guard
    gc.collect()
    assert hooks_on(model) == before
    then = snapshot(model)
    plain(model)
    assert changed(model, then, free, frozen=True)
    del model
    for _ in range(30):
        other = nn.Linear(3, 3)
        was = snapshot(other)
        optimizer = optim.SGD(other.parameters(), lr=0.1)
        other(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert changed(other, was, {}, frozen=True) == 12


def test_wholly_free_and_untrainable_parameters() -> None:
    """Fails if a free tensor is held, or one with requires_grad=False is not when an optimizer
    decays it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    free = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model[1].named_parameters("1")}
    then = snapshot(model)
    with Guard(model, free) as guard:
        model[0].weight.grad = torch.ones(2, 2)
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert guard.steps == 1
        assert guard.moved() == {}
    assert changed(model, then, free, frozen=True) == 0
    assert changed(model, then, free, frozen=False) == 6
