"""What is said of reset entries that did not train: by whom they are owned, and why they stayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn, optim

from deepclean_hooks.guard.guard import Guard
from lab.guarding import Masks, loss_of, plant, small

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")


def reset(model: nn.Module) -> tuple[Masks, dict[str, int]]:
    """Free entries, set to 0, and how many there are of each parameter."""
    free = plant(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in free:
                p[free[name]] = 0.0
    return free, {name: int(mask.sum()) for name, mask in free.items() if mask.any()}


def train(model: nn.Module, *optimizers: optim.Optimizer) -> None:
    for _ in range(3):
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def head_alone(model: nn.Module) -> None:
    train(model, optim.AdamW(model[5].parameters(), lr=1e-2))


def several_optimizers(model: nn.Module) -> None:
    train(model, *(optim.SGD(model[i].parameters(), lr=1e-2) for i in (3, 5)))


def added_later(model: nn.Module) -> None:
    optimizer = optim.SGD(model[5].parameters(), lr=1e-2)
    train(model, optimizer)
    optimizer.add_param_group({"params": list(model[3].parameters())})
    train(model, optimizer)


def never_asked(model: nn.Module) -> None:
    model[0].requires_grad_(False)
    train(model, optim.AdamW(model.parameters(), lr=1e-2))


def not_in_the_loss(model: nn.Module) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model[3:](torch.ones(2, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("loop", "layers", "why"),
    [
        (head_alone, "03", "owned by no optimizer"),
        (several_optimizers, "0", "owned by no optimizer"),
        (added_later, "0", "owned by no optimizer"),
        (never_asked, "0", "without a gradient"),
        (not_in_the_loss, "0", "without a gradient"),
    ],
)
def test_entries_that_nobody_trains_are_counted(
    loop: Callable[[nn.Module], None], layers: str, why: str
) -> None:
    """Fails if reset entries that stay 0 for ever, for no optimizer has them or no gradient reaches
    them, are not said, or entries that trained are said to have stayed."""
    model = small()
    free, counts = reset(model)
    with Guard(model, free) as guard:
        loop(model)
        (said,) = guard.remarks(counts)
        account = guard.account()
    still = {name: count for name, count in counts.items() if name[0] in layers}
    assert said.startswith(f"{sum(still.values())} reset entries (")
    assert why in said
    assert all(f"{name}: {count}" in said for name, count in still.items())
    for name, count in counts.items():
        assert account[name].free == count
        assert account[name].moved == (name not in still)
        left = dict(model.named_parameters())[name][free[name]]
        assert account[name].zero == int((left == 0).sum())
        assert (account[name].zero == count) >= (name in still)


def test_compact_leaves_own_their_parameters() -> None:
    """Fails if an optimizer of compact() leaves is not taken for one of the model's entries."""
    model = small()
    free, counts = reset(model)
    with Guard(model, free) as guard:
        leaves = guard.compact()
        train(model, optim.SGD([leaves[name] for name in leaves if name[0] != "0"], lr=0.1))
        (said,) = guard.remarks(counts)
        assert guard.account()["3.weight"].owned
    assert said.startswith(f"{counts['0.weight'] + counts.get('0.bias', 0)} reset entries")


def test_a_loop_that_trains_everything_is_not_remarked_upon() -> None:
    """Fails if a usual run ends with a warning."""
    model = small()
    free, counts = reset(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Guard(model, free) as guard:
            train(model, optim.AdamW(model.parameters(), lr=1e-2))
            assert guard.remarks(counts) == []


def test_what_trained_before_a_resume_is_not_missed() -> None:
    """Fails if a resumed run whose optimizer has the head alone is told that nobody trains what was
    trained before."""
    model = small()
    free, counts = reset(model)
    with torch.no_grad():
        model[3].weight.add_(1.0)  # trained before
    with Guard(model, free) as guard:
        train(model, optim.SGD(model[5].parameters(), lr=0.1))
        (said,) = guard.remarks(counts, steps=guard.steps + 4)
        assert "0.weight" in said
        assert "3.weight" not in said
        assert "3.weight" in guard.remarks(counts)[0]


def another_object(model: nn.Module) -> None:
    train(built := small(), optim.SGD(built.parameters(), lr=0.1))


def never_stepped(model: nn.Module) -> None:
    loss_of(model).backward()


@pytest.mark.parametrize("loop", [another_object, never_stepped, lambda model: None])
def test_a_run_without_a_step_says_so(loop: Callable[[nn.Module], None]) -> None:
    """Fails if a loop that trained another object ends as if it had trained this model."""
    model = small()
    free, counts = reset(model)
    with Guard(model, free) as guard:
        loop(model)
        guard.check()
        (said,) = guard.remarks(counts)
        assert "no optimizer step of this model was seen" in said
        assert guard.remarks(counts, steps=5) == []  # those before a resume
    with pytest.raises(RuntimeError, match="before release"):
        guard.account()


def still(model: nn.Module) -> None:
    train(model, optim.SGD(model.parameters(), lr=0.0))


def skipped(model: nn.Module) -> None:
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    loss_of(model).mul(0).backward()  # what a schedule or a mask may leave of a loss
    optimizer.step()


@pytest.mark.parametrize("loop", [still, skipped])
def test_steps_that_move_nothing_are_told(loop: Callable[[nn.Module], None]) -> None:
    """Fails if a run whose learning rate or gradients are 0 ends as if it had trained."""
    model = small()
    free, counts = reset(model)
    with Guard(model, free) as guard:
        loop(model)
        (said,) = guard.remarks(counts)
    assert "none moved by a bit; check the learning rate" in said


def test_weights_written_without_an_optimizer_are_told_apart() -> None:
    """Fails if an update by hand is taken for no update."""
    model = small()
    free, counts = reset(model)
    with Guard(model, free) as guard:
        loss_of(model).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in free:
                    p.sub_(p.grad * free[name], alpha=0.1)
        (said,) = guard.remarks(counts)
    assert "written by hand" in said
