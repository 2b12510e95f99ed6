"""Compact tensors: what an optimizer remembers has the size of what may train, and training ends in
the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim

from deepclean_hooks.guard.guard import Guard
from deepclean_hooks.stored.bits import differing
from lab.guarding import Masks, changed, loss_of, plant, small, snapshot
from lab.hooks import hooks_on

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")

MAKES: dict[str, Callable[..., optim.Optimizer]] = {
    "SGD": lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=False),
    "Adam": lambda ps: optim.Adam(ps, lr=1e-2, foreach=False),
    "AdamW": lambda ps: optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=False),
    "AdamW amsgrad": lambda ps: optim.AdamW(ps, lr=1e-2, amsgrad=True, foreach=False),
    "RMSprop": lambda ps: optim.RMSprop(ps, lr=1e-2, foreach=False),
    "Adagrad": lambda ps: optim.Adagrad(ps, lr=1e-2, foreach=False),
}


def train(model: nn.Module, optimizer: optim.Optimizer, count: int = 4) -> None:
    """Steps of two accumulated backward passes; before the third a gradient is thrown away."""
    for step in range(count):
        if step == 2:
            (loss_of(model) * 100).backward()
            optimizer.zero_grad()
        for _ in range(2):
            (loss_of(model) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def both(
    make: Callable[..., optim.Optimizer],
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> tuple[nn.Module, nn.Module, dict[str, Tensor], Masks]:
    """A model trained in compact form, one trained whole, what both were, and the masks."""
    models = []
    for compact in (True, False):
        model = small()
        free = plant(model)
        free["3.bias"][:] = True  # wholly free, so held by no guard
        model = prepare(model)
        then = snapshot(model)
        with Guard(model, free) as guard:
            train(model, make(guard.compact().values() if compact else model.parameters()))
            guard.check()
            assert guard.steps == 4
        models.append(model)
    return models[0], models[1], then, free


@pytest.mark.parametrize("name", MAKES)
def test_ends_in_the_bits_of_the_whole_run(name: str) -> None:
    """Fails if a gradient is lost, added twice or not thrown away, or a value lands elsewhere."""
    compact, whole, then, free = both(MAKES[name])
    for key, parameter in compact.named_parameters():
        assert not differing(parameter, dict(whole.named_parameters())[key]).any()
    assert changed(compact, then, free, frozen=True) == 0
    assert changed(compact, then, free, frozen=False)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.double(),
        lambda model: model.bfloat16(),
    ],
    ids=["channels_last", "float64", "bfloat16"],
)
def test_other_layouts_and_widths(prepare: Callable[[nn.Module], nn.Module]) -> None:
    """Fails if offsets are counted in another order than the memory's."""
    compact, whole, then, free = both(MAKES["AdamW"], prepare)
    for key, parameter in compact.named_parameters():
        assert not differing(parameter, dict(whole.named_parameters())[key]).any()
    assert changed(compact, then, free, frozen=True) == 0


def test_a_parameter_with_gaps() -> None:
    """Fails if the entries of memory that belong to another tensor are counted or written."""
    memory = torch.randn(4, 10)
    model = nn.Linear(5, 4, bias=False)
    model.weight = nn.Parameter(memory[:, ::2])
    before, free = memory.clone(), {"weight": torch.rand(4, 5) < 0.5}
    free["weight"][0, 0] = True
    with Guard(model, free) as guard:
        optimizer = optim.SGD(guard.compact().values(), lr=0.1)
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        guard.check()
    moved = memory != before
    assert torch.equal(moved[:, ::2], free["weight"])
    assert not moved[:, 1::2].any()


def test_state_has_the_size_of_the_free_entries() -> None:
    """Fails if the optimizer remembers frozen entries, or the model keeps gradients beside."""
    model = small()
    free = plant(model)
    with Guard(model, free) as guard:
        optimizer = optim.AdamW(guard.compact().values())
        loss_of(model).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        sizes = [state["exp_avg"].numel() for state in optimizer.state.values()]
        assert sizes == [int(mask.sum()) for mask in free.values() if mask.any()]


def test_scaler_and_clipping_of_the_leaves() -> None:
    """Fails if a scaled or infinite gradient bypasses the scaler, or the norm is not that of the
    free entries."""
    ends = []
    for compact in (True, False):
        model = small().double()
        free = plant(model)
        with Guard(model, free) as guard:
            whole = dict(model.named_parameters())
            tensors = list((guard.compact() if compact else whole).values())
            optimizer = optim.AdamW(tensors, lr=1e-2)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            for factor in (1.0, float("inf"), 1.0):
                optimizer.zero_grad()
                scaler.scale(loss_of(model) * factor).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(tensors, 0.05)
                scaler.step(optimizer)
                scaler.update()
            assert norm > 0.05
        ends.append(snapshot(model))
    for name, end in ends[0].items():
        torch.testing.assert_close(end, ends[1][name], rtol=1e-10, atol=1e-12)


def test_gradients_from_before_are_taken_along() -> None:
    """Fails if a backward pass before compact() is lost."""
    model = small()
    free = plant(model)
    with Guard(model, free) as guard:
        loss_of(model).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        for name, leaf in guard.compact().items():
            assert torch.equal(leaf.grad, grads[name][free[name]])
            assert leaf.shape == (int(free[name].sum()),)
        assert guard.compact().keys() == {name for name, mask in free.items() if mask.any()}


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda ps, _: optim.Adafactor(ps), ValueError, "Adafactor cannot step compact tensors"),
        (lambda _, model: optim.SGD(model.parameters()), RuntimeError, r"SGD steps parameters of"),
        (lambda ps, _: optim.LBFGS(ps, max_iter=3), RuntimeError, r"LBFGS, SAM.*model\.parameters"),
    ],
    ids=["shape", "model", "closure"],
)
def test_what_it_cannot_serve_is_refused(
    make: Callable[..., optim.Optimizer], error: type[Exception], said: str
) -> None:
    """Fails if an optimizer trains something else than it would whole, in silence."""
    model = small()
    free = plant(model)
    with Guard(model, free) as guard:
        optimizer = make(list(guard.compact().values()), model)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        with pytest.raises(error, match=said):
            optimizer.step(closure)


def test_sparse_gradients_are_refused() -> None:
    """Fails if rows of a sparse gradient are read as entries of a dense one."""
    model = nn.Embedding(6, 3, sparse=True)
    with Guard(model, {"weight": torch.ones(6, 3, dtype=torch.bool)}) as guard:
        guard.compact()
        with pytest.raises(ValueError, match=r"weight has a torch\.sparse_coo gradient.*sparse="):
            model(torch.tensor([2, 5])).sum().backward()


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if gradients are taken before they are averaged."""
    monkeypatch.setattr("deepclean_hooks.ranks.world", lambda: (0, 2))
    with Guard(nn.Linear(2, 2), {}) as guard, pytest.raises(ValueError, match="the 2 processes"):
        guard.compact()


def test_release_leaves_no_hook() -> None:
    """Fails if the leaves still take the model's gradients after the guard is gone."""
    model = small()
    free, before = plant(model), hooks_on(model)
    with Guard(model, free) as guard:
        optimizer = optim.SGD(guard.compact().values(), lr=0.1)
        assert hooks_on(model) != before
        train(model, optimizer)
    assert hooks_on(model) == before
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=r"before release"):
        guard.compact()
