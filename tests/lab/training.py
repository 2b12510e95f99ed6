"""Small models, data and checks for the tests of the adapters; also imported by their workers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import deepclean_hooks as deepclean
from deepclean_hooks.stored.bits import differing

CLASSES, SIZE = 4, 8
METHOD = deepclean.DeepClean(gamma=1.1)
SAVING = {"save_strategy": "steps", "save_steps": 3}  # options of a Trainer


class Cut(RuntimeError):
    """Stops a run."""


class CutAt(TrainerCallback):
    """Raises after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The cut."""
        if state.global_step == self.step:
            raise Cut


def data(start: int, stop: int) -> TensorDataset:
    """Samples start..stop of a fixed set of 64; images (N, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(64, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(CLASSES, (64,), generator=generator)
    return TensorDataset(images[start:stop], labels[start:stop])


# 13 and 37: no batch size and no number of ranks divides them.
FORGET, RETAIN, TEST = data(0, 13), data(13, 50), data(50, 64)


def hf_vit(dropout: float = 0.0) -> nn.Module:
    """A seeded transformers ViT of 5.4k weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(
        ViTConfig(
            **sizes,
            intermediate_size=32,
            image_size=SIZE,
            patch_size=4,
            num_labels=CLASSES,
            hidden_dropout_prob=dropout,
        )
    )


def timm_network(dropout: float = 0.0) -> nn.Module:
    """A seeded timm ViT of 8k weights, as it is."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.models.VisionTransformer(
        img_size=SIZE, patch_size=4, num_classes=CLASSES, drop_rate=dropout, **sizes
    )


def timm_vit(dropout: float = 0.0) -> nn.Module:
    """The timm ViT in the wrapper that makes it a Trainer's model."""
    return deepclean.ImageClassifier(timm_network(dropout))


def convolutional() -> nn.Module:
    """A small convolutional network with BatchNorm, in the wrapper."""
    torch.manual_seed(0)
    return deepclean.ImageClassifier(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, CLASSES)
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformers": hf_vit,
    "timm": timm_vit,
    "convolutional": convolutional,
}


ADDITIVE: dict[str, deepclean.Method] = {
    "ReferenceGuided": deepclean.ReferenceGuided(TEST),
    "ReferenceGuided, mean": deepclean.ReferenceGuided(TEST, "mean"),
    "ReferenceGuided, W_f": deepclean.ReferenceGuided(TEST, train=METHOD),
    "ReferenceGuided, reset": deepclean.ReferenceGuided(TEST, train=METHOD, reset=True),
    "NegGradPlus": deepclean.NegGradPlus(),
    "RandomLabel": deepclean.RandomLabel(),
    "Amnesiac": deepclean.Amnesiac(),
    "SalUn": deepclean.SalUn(),
    "BadTeaching": deepclean.BadTeaching(build=timm_vit),
    "L1Sparse": deepclean.L1Sparse(epochs=2, steps_per_epoch=3),
    "MSG": deepclean.MSG(),
}
"""Methods that add a term to the loop's loss; compared with those there are by a test."""


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    """Seeded arguments for 6 steps with decay and clipping on the CPU, nothing saved, no bars."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 5,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **options})


def trainer(
    folder: Path | str,
    model: nn.Module,
    callback: deepclean.DeepCleanCallback | None = None,
    kind: type[Trainer] = Trainer,
    others: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer on the retain set with the callback; `options` are TrainingArguments."""
    return kind(
        model=model,
        args=arguments(folder, **options),
        train_dataset=RETAIN,
        data_collator=deepclean.ImageClassifier.collate,
        callbacks=[] if callback is None else [callback],
        **(others or {}),
    )


def callback(**options: Any) -> deepclean.DeepCleanCallback:
    """The callback without scores, which most tests do not need."""
    return deepclean.DeepCleanCallback(FORGET, **{"method": METHOD, "scores": False, **options})


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states agree in every bit."""
    assert one.keys() == other.keys()
    return not any(bool(differing(value, other[name]).any()) for name, value in one.items())


def truth(model: nn.Module, method: deepclean.Method = METHOD) -> dict[str, Tensor]:
    """The masks that a session in one process selects, on a copy in float32."""
    run = deepclean.Session(
        copy.deepcopy(model), method, scores=False, collate_fn=deepclean.ImageClassifier.collate
    )
    run.measure(FORGET, RETAIN)
    run.select()
    return run.free


def moved(model: nn.Module, then: dict[str, Tensor], free: dict[str, Tensor]) -> tuple[int, int]:
    """How many frozen, and how many free parameter entries have other bits than `then`."""
    frozen_moved = free_moved = 0
    for name, parameter in model.named_parameters():
        differ = differing(parameter, then[name])
        mask = free.get(name, torch.zeros_like(differ))
        frozen_moved += int((differ & ~mask).sum())
        free_moved += int((differ & mask).sum())
    return frozen_moved, free_moved
