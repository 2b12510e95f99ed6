"""Loops on Accelerate and the hook around them, for its tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import deepclean_hooks as deepclean
from lab.training import (
    FORGET,
    METHOD,
    RETAIN,
    hf_vit,
    timm_vit,
)

MODELS = {"transformers": hf_vit, "timm": timm_vit}


def retain_loader() -> DataLoader[Any]:
    """37 samples in batches of 5, in order."""
    return DataLoader(RETAIN, batch_size=5, collate_fn=deepclean.ImageClassifier.collate)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Decays and steps every weight."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def accumulate(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    """Trains on every batch, a step for as many batches as the accelerator gathers."""
    for batch in loader:
        with accelerator.accumulate(model):
            output = model(batch["pixel_values"])
            accelerator.backward(F.cross_entropy(output["logits"], batch["labels"]))
            optimizer.step()
            optimizer.zero_grad()


def hook(accelerator: Accelerator, model: nn.Module, **options: Any) -> deepclean.DeepCleanHook:
    """The hook without scores."""
    settings = {
        "method": METHOD,
        "scores": False,
        "collate_fn": deepclean.ImageClassifier.collate,
        "progress": False,
    }
    return deepclean.DeepCleanHook(
        accelerator, model, **{"forget": FORGET, "retain": RETAIN, **settings, **options}
    )


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    steps: int = 6,
    first: int = 0,
) -> Iterator[int]:
    """An ordinary loop on Accelerate with clipping; yields after each step."""
    model.train()
    for step, batch in enumerate(loader, 1):
        if step <= first:
            continue
        accelerator.backward(
            F.cross_entropy(model(batch["pixel_values"])["logits"], batch["labels"])
        )
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        yield step
        if step == steps:
            return


def run_all(*everything: Any, **options: Any) -> None:
    """The loop to its end."""
    for _ in train(*everything, **options):
        pass
