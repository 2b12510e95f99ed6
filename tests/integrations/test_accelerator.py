"""The Accelerate hook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType

import deepclean_hooks as deepclean
from lab.accelerating import accumulate, adamw, hook, retain_loader, run_all
from lab.training import (
    FORGET,
    bits_of,
    hf_vit,
    moved,
    same_bits,
    timm_vit,
    truth,
)

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the reset entries are dead", "ignore:no optimizer step of this model was seen"
    ),
    pytest.mark.usefixtures("fresh_accelerate"),
]


@pytest.mark.parametrize("order", ["prepared before", "prepared inside", "made before"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_orders_and_precisions(order: str, precision: str) -> None:
    """Fails if `prepare` undoes the guard, or mixed precision enters the measurement."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = hf_vit()
    then, free = bits_of(model), truth(model)
    given: Any = model
    optimizer: Any = adamw(model)
    loader: Any = retain_loader()
    if order == "made before":
        run = hook(accelerator, given)
    if order != "prepared inside":
        given, optimizer, loader = accelerator.prepare(given, optimizer, loader)
    if order != "made before":
        run = hook(accelerator, given)
    with run as session:
        if order == "prepared inside":
            given, optimizer, loader = accelerator.prepare(given, optimizer, loader)
        run_all(accelerator, given, optimizer, loader)
    frozen_moved, free_moved = moved(model, then, free)
    assert frozen_moved == 0
    assert free_moved > 0
    assert session.report.frozen_entries_moved == 0
    assert session.report.selected_entries == sum(int(mask.sum()) for mask in free.values())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_accumulation_of_the_users_accelerator_is_kept() -> None:
    """Fails if the hook makes an Accelerator of its own, which resets the accumulation to 1."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    with hook(accelerator, wrapped) as session:
        wrapped.train()
        accumulate(accelerator, wrapped, optimizer, loader)
    assert accelerator.gradient_accumulation_steps == 3
    assert session.report.optimizer_steps == 3  # 8 batches
    assert session.report.frozen_entries_moved == 0


def test_carried_momentum_is_cleared() -> None:
    """Fails if moments from before the reset move weights towards what was forgotten."""
    ends = []
    for steps_before in (0, 3):
        accelerator = Accelerator(cpu=True)
        model = timm_vit()
        wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
        then = bits_of(model)
        run_all(accelerator, wrapped, optimizer, loader, steps=steps_before or 1)
        if not steps_before:
            optimizer.optimizer.state.clear()
        model.load_state_dict(then)
        with hook(accelerator, wrapped):
            run_all(accelerator, wrapped, optimizer, loader)
        ends.append(bits_of(model))
    assert same_bits(*ends)


def test_exception_leaves_no_hook() -> None:
    """Fails if a hook outlives an exception in the block."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    with pytest.raises(KeyboardInterrupt), hook(accelerator, model):
        assert any(p._post_accumulate_grad_hooks for p in model.parameters())
        raise KeyboardInterrupt
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def _engine(kind: str) -> Any:
    """An accelerator in shape, on an engine that is not installed here."""

    class Engine:
        distributed_type = DistributedType(kind)
        is_fsdp2 = False

    return Engine()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("DEEPSPEED", "DEEPSPEED"), ("MEGATRON_LM", "MEGATRON_LM"), ("FSDP", "FSDP1")],
)
def test_engines_are_refused(kind: str, said: str) -> None:
    """Fails if an engine that hides the weights is begun with."""
    with pytest.raises(ValueError, match=said):
        hook(_engine(kind), timm_vit())


class OwnObjective(deepclean.DeepClean):
    """Trains by a loss of its own."""

    own_training = True


def test_method_with_its_own_objective_is_refused() -> None:
    """Fails if the loop's loss silently takes the place of the method's."""
    with pytest.raises(ValueError, match="objective of its own"):
        hook(Accelerator(cpu=True), timm_vit(), method=OwnObjective())


def test_fsdp2_order_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a guard set before FSDP2 replaces the parameters goes unnoticed until the end."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    run = hook(accelerator, timm_vit())
    run.reset()
    with pytest.raises(RuntimeError, match=r"call accelerator\.prepare"), run:
        pass


def test_every_option_and_a_report_folder(tmp_path: Path) -> None:
    """Fails if the hook does not take what a session takes, or writes no report."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    settings = {"scores": True, "forget_test": FORGET, "gold": [timm_vit(), timm_vit()]}
    run = hook(accelerator, wrapped, dead_count=False, folder=tmp_path / "told", **settings)
    with run as session:
        assert json.loads((tmp_path / "told" / "report.json").read_text())["phase"] == "guarded"
        run_all(accelerator, wrapped, optimizer, loader)
    assert "forget_test" in session.report.scores["after"]["sets"]
    stored = json.loads((tmp_path / "told" / "report.json").read_text())
    assert stored["model_after"] == session.report.model_after
    assert (tmp_path / "told" / "report.txt").read_text() == f"{session.report}\n"
    with pytest.raises(TypeError, match="no option 'golds'"):
        hook(accelerator, wrapped, golds=1)
