"""A method's term on Accelerate: what a plain loop and a Trainer add, whatever the precision."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

import deepclean_hooks as deepclean
from lab.accelerating import accumulate, adamw, hook, retain_loader, run_all
from lab.methods import ADDITIVE as every_additive_method
from lab.training import (
    ADDITIVE,
    FORGET,
    METHOD,
    RETAIN,
    arguments,
    bits_of,
    callback,
    data,
    hf_vit,
    same_bits,
    timm_vit,
)

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the reset entries are dead", "ignore:no optimizer step of this model was seen"
    ),
    pytest.mark.usefixtures("fresh_accelerate"),
]


def plainly(method: deepclean.Method = METHOD) -> nn.Module:
    """Fine-tuned in a loop of one's own."""
    model = timm_vit()
    with deepclean.unlearning(
        model,
        forget=FORGET,
        retain=RETAIN,
        method=method,
        scores=False,
        collate_fn=deepclean.ImageClassifier.collate,
        batch_size=5,
    ):
        optimizer = adamw(model)
        model.train()
        for step, batch in enumerate(retain_loader(), 1):
            output = model(batch["pixel_values"])
            F.cross_entropy(output["logits"], batch["labels"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            if step == 6:
                break
    return model


def on_accelerate(method: deepclean.Method = METHOD) -> nn.Module:
    """Fine-tuned in a loop on Accelerate."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    with hook(accelerator, wrapped, method=method, batch_size=5):
        run_all(accelerator, wrapped, optimizer, loader)
    return model


def in_a_trainer(folder: Path, method: deepclean.Method = METHOD) -> nn.Module:
    """Fine-tuned by a Trainer."""
    model = timm_vit()
    optimizer = adamw(model)
    Trainer(
        model=model,
        args=arguments(folder, train_sampling_strategy="sequential"),
        train_dataset=RETAIN,
        data_collator=deepclean.ImageClassifier.collate,
        callbacks=[callback(method=method, batch_size=5)],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    ).train()
    return model


@pytest.mark.parametrize("name", ADDITIVE)
def test_three_loops_add_the_same_term(name: str, tmp_path: Path) -> None:
    """Fails if an adapter does not add a method's term, adds another batch's, or adds it before
    clipping, by one bit; the loop's own loss alone must end elsewhere."""
    method = ADDITIVE[name]
    plain = bits_of(plainly(method))
    assert same_bits(plain, bits_of(on_accelerate(method)))
    assert same_bits(plain, bits_of(in_a_trainer(tmp_path, method)))
    assert not same_bits(plain, bits_of(plainly(deepclean.FineTune())))


def test_the_loops_are_tried_with_every_term() -> None:
    """Fails if a method that adds a term has no row here."""
    kinds = {type(method) for method in every_additive_method.values()}
    assert kinds == {type(method) for method in ADDITIVE.values()}


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_does_not_scale_the_term(fused: bool) -> None:
    """Fails if the term is added to gradients that are still scaled, as a fused optimizer's are
    when it steps, or not scaled as they are: the same loop without a scaler must end alike."""
    ends = []
    for scaled in (False, True):
        model = timm_vit()
        with deepclean.unlearning(
            model,
            forget=FORGET,
            retain=RETAIN,
            method=ADDITIVE["ReferenceGuided"],
            scores=False,
            collate_fn=deepclean.ImageClassifier.collate,
        ):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
            for batch in itertools.islice(retain_loader(), 4):
                output = model(batch["pixel_values"])
                scaler.scale(F.cross_entropy(output["logits"], batch["labels"])).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        ends.append(bits_of(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-5, atol=1e-6)


def test_the_term_is_added_once_an_accumulated_step() -> None:
    """Fails if each batch that the loop accumulates draws a forget batch, or the term is divided
    by their number: three parts of a batch must end as the batch in one."""
    ends = []
    for parts in (1, 3):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        model = timm_vit()
        loader = DataLoader(
            data(13, 37), batch_size=6 // parts, collate_fn=deepclean.ImageClassifier.collate
        )
        given = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
        wrapped, optimizer, prepared = given
        options = {"method": ADDITIVE["ReferenceGuided"], "batch_size": 5}
        with hook(accelerator, wrapped, **options) as run:
            accumulate(accelerator, wrapped, optimizer, prepared)
        assert run.report.optimizer_steps == 4
        ends.append(bits_of(model))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-5, atol=1e-6)


def test_half_precision_does_not_reach_the_term() -> None:
    """Fails if Accelerate's autocast, which stands inside `forward`, has the forget batch computed
    in bfloat16: with weight 0 on the loop's loss both precisions must end in the same bits."""
    ends = []
    for precision in ("no", "bf16"):
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model = hf_vit()
        wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
        with hook(accelerator, wrapped, method=ADDITIVE["ReferenceGuided"]):
            for batch in itertools.islice(loader, 3):
                output = wrapped(batch["pixel_values"])
                loss = F.cross_entropy(output["logits"].float(), batch["labels"])
                accelerator.backward(0 * loss)
                optimizer.step()
                optimizer.zero_grad()
        ends.append(bits_of(model))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    assert same_bits(*ends)
    assert not same_bits(ends[0], bits_of(hf_vit()))
