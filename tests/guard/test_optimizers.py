"""The guard under every optimizer: frozen bits hold, free entries train as they would alone."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from deepclean_hooks.guard.guard import Guard
from deepclean_hooks.stored.bits import differing
from lab.guarding import changed, data, expecting, loss_of, plant, rows, small, snapshot, steps
from lab.optimizers import Row, build

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")


@rows()
@pytest.mark.parametrize("kind", ["fresh", "carried", "clipped"])
def test_frozen_bits_hold_after_every_step(row: Row, kind: str) -> None:
    """Fails if a step of any optimizer, or its mode switch, leaves a frozen entry moved; 8 steps
    pass Lookahead's 6."""
    model = small()
    free, then = plant(model), snapshot(model)
    opts = build(row, model)
    if kind == "carried":
        steps(row, model, opts, 3)
        assert changed(model, then, free, frozen=True)  # what happens without the guard
        model.load_state_dict(then)
    with expecting(row), Guard(model, free, optimizers=opts if row.modes else ()) as guard:
        for _ in range(8):
            steps(row, model, opts, 1, clip=0.5 if kind == "clipped" else None)
            assert changed(model, then, free, frozen=True) == 0
        assert guard.moved() == {}
        guard.check()
        assert guard.steps == 8 * len(opts)
    assert changed(model, then, free, frozen=False)


@rows()
def test_cleared_state_trains_as_a_fresh_optimizer(row: Row) -> None:
    """Fails if moments, averages or step counters from before the guard reach the free entries."""
    if row.name == "timm kron":
        pytest.skip("its random generator goes on where it was, which remembers no weights")
    ends = []
    for carried in (False, True):
        model = small()
        free, then = plant(model), snapshot(model)
        opts = build(row, model)
        if carried:
            steps(row, model, opts, 3)
            model.load_state_dict(then)
        model.zero_grad()
        with expecting(row), Guard(model, free, optimizers=opts):
            steps(row, model, opts, 2)
        ends.append(snapshot(model))
    assert all(not differing(ends[0][name], ends[1][name]).any() for name in ends[0])


def test_state_is_kept_for_a_resumed_run() -> None:
    """Fails if clear_optimizer_state=False deletes momentum, or if clearing touches another
    model's."""
    model, other = small(), nn.Linear(2, 2)
    free = plant(model)
    optimizer = optim.AdamW([*model.parameters(), *other.parameters()], lr=1e-2)
    for kept in (True, False):
        (loss_of(model) + other(torch.ones(1, 2)).sum()).backward()
        optimizer.step()
        with Guard(model, free, clear_optimizer_state=not kept, optimizers=[optimizer]):
            assert all((p in optimizer.state) == kept for p in model.parameters())
            assert all(optimizer.state[p]["step"] > 0 for p in other.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=False),
        lambda ps: optim.AdamW(ps, lr=1e-2, weight_decay=1e-2, foreach=False),
    ],
    ids=["SGD", "AdamW"],
)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_free_entries_train_as_if_alone(
    make: Callable[..., optim.Optimizer], clip: float | None
) -> None:
    """Fails if frozen gradients reach the clipping norm, or decay or momentum leak into free
    entries.

    The other route: only the free entries exist, as one 1-D parameter for each tensor.
    """
    model = small().double()
    free, alone = plant(model), copy.deepcopy(model)
    images, labels = data()
    with Guard(model, free):
        optimizer = make(model.parameters())
        for _ in range(6):
            optimizer.zero_grad()
            functional.cross_entropy(model(images.double()), labels).backward()
            if clip is not None:
                assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
            optimizer.step()

    whole = {name: p.detach() for name, p in alone.named_parameters()}
    lines = {name: whole[name][mask].requires_grad_() for name, mask in free.items()}
    optimizer = make(list(lines.values()))
    for _ in range(6):
        optimizer.zero_grad()
        put = {n: whole[n].index_put(free[n].nonzero(as_tuple=True), lines[n]) for n in free}
        logits = torch.func.functional_call(alone, {**whole, **put}, (images.double(),))
        functional.cross_entropy(logits, labels).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(list(lines.values()), clip)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in free:
            torch.testing.assert_close(parameter[free[name]], lines[name], rtol=1e-12, atol=1e-14)


# optimizers


class Sam(optim.Optimizer):
    """Sharpness-aware minimisation as it is usually written: a hooked optimizer that steps
    another."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.base = optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2)
        super().__init__(params, {})
        self.param_groups = self.base.param_groups

    def step(self, closure: Callable[[], Tensor]) -> None:
        closure = torch.enable_grad()(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                self.state[p]["was"] = p.clone()
                p.add_(torch.ones_like(p), alpha=1e-2)
            closure()
            for p in self.param_groups[0]["params"]:
                p.copy_(self.state[p]["was"])
            self.base.step()


def test_sam_counts_one_step() -> None:
    """Fails if the inner step of a hooked optimizer is counted too, or its perturbation stays."""
    model = small()
    free, then = plant(model), snapshot(model)
    with Guard(model, free) as guard:
        optimizer = Sam(list(model.parameters()))
        steps(Row("sam", Sam, closure=True), model, [optimizer], 3)
        guard.check()
        assert guard.steps == 3
    assert changed(model, then, free, frozen=True) == 0


@pytest.mark.parametrize("passed", [True, False])
def test_schedule_free_wrapper(passed: bool) -> None:
    """Fails if state in use is cleared in mid-step (KeyError: 'z'), or the write after the inner
    step stays.

    Found only inside its first step, that one step's write is put back by the second.
    """
    schedulefree = pytest.importorskip("schedulefree")
    model = small()
    free, then = plant(model), snapshot(model)
    optimizer = schedulefree.ScheduleFreeWrapper(
        optim.SGD(model.parameters(), lr=0.1), weight_decay_at_y=0.1
    )
    caught = contextlib.nullcontext() if passed else pytest.warns(UserWarning, match="was kept")
    with caught, Guard(model, free, optimizers=[optimizer] if passed else ()) as guard:
        steps(Row("", Sam, modes=True), model, [optimizer], 3)
        assert guard.steps == 3
        guard.check()
    assert changed(model, then, free, frozen=True) == 0
    assert "step" not in vars(optimizer)
    assert "eval" not in vars(optimizer)


def test_accelerated_optimizer_is_unwrapped() -> None:
    """Fails if what Accelerate's prepare() returns is not cleared, or its own step is counted
    too."""
    accelerate = pytest.importorskip("accelerate")
    model = small()
    free, then = plant(model), snapshot(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optim.AdamW(model.parameters(), lr=1e-2))
    with Guard(prepared, free, optimizers=[optimizer]) as guard:
        for _ in range(3):
            accelerator.backward(loss_of(prepared))
            accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        guard.check()
        assert guard.steps == 3
    assert changed(model, then, free, frozen=True) == 0


def test_coupling_is_said_once() -> None:
    """Fails if a coupling optimizer warns at each step, or an elementwise one warns."""
    model = small()
    free = plant(model)
    with warnings.catch_warnings(record=True) as caught, Guard(model, free):
        warnings.simplefilter("always")
        for make in (optim.Adafactor, optim.Adam):
            optimizer = make(model.parameters(), lr=1e-2)
            for _ in range(3):
                loss_of(model).backward()
                optimizer.step()
    assert [str(w.message).split(":")[0] for w in caught] == ["Adafactor couples entries"]
