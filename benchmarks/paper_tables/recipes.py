"""How originals and golds are trained: the paper's recipe, and a fast one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR
from torch.utils.data import Dataset, Subset, TensorDataset

from benchmarks.lab.data import Kind

from .augment import cropped


@dataclass(frozen=True)
class Recipe:
    """SGD with cross-entropy (no label smoothing), random crops, and mirror images where these
    keep the class.

    `milestones`: epochs after which the rate is divided by 5; none means one cycle that peaks at
    `lr` after a quarter of the steps. `bfloat16` is used on a GPU only.
    """

    name: str
    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    milestones: tuple[int, ...] = ()
    channels_last: bool = False
    bfloat16: bool = False

    def settings(self) -> dict[str, object]:
        """Every hyper-parameter by name."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}


# Shi et al.: SGD 0.1, momentum 0.9, decay 5e-4; the batch size is not stated. Tiny-ImageNet-32
# stands for CIFAR-100 and has its schedule.
_LONG = Recipe("paper", 200, milestones=(60, 120, 160))
PAPER = {
    "mnist": Recipe("paper", 10, milestones=(4, 8)),
    "digits": Recipe("paper", 10, milestones=(4, 8)),
    "cifar10": Recipe("paper", 20, milestones=(6, 12, 16)),
    "cifar100": _LONG,
    "tinyimagenet32": _LONG,
}


def fast(epochs: int, *, batch_size: int = 64, lr: float = 0.2) -> Recipe:
    """One cycle of so many epochs."""
    return Recipe(
        "fast",
        epochs,
        batch_size=batch_size,
        lr=lr,
        nesterov=True,
        channels_last=True,
        bfloat16=True,
    )


def train(
    model: nn.Module, data: Dataset[tuple[torch.Tensor, ...]], kind: Kind, recipe: Recipe, seed: int
) -> None:
    """Trains in place; order and augmentation are drawn by the seed."""
    pixels, labels = _tensors(data)
    generator = torch.Generator().manual_seed(seed)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    steps = max(1, len(labels) // recipe.batch_size)
    schedule = _schedule(optimizer, recipe, steps)
    model.train()
    half = recipe.bfloat16 and pixels.device.type == "cuda"
    for _ in range(recipe.epochs):
        # The incomplete last batch is left out: one sample alone has no batch statistics.
        for chosen in torch.randperm(len(labels), generator=generator).split(recipe.batch_size)[
            :steps
        ]:
            chosen = chosen.to(pixels.device)
            batch = cropped(pixels[chosen], kind.margin, kind.flip, generator)
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
                loss = F.cross_entropy(model(batch), labels[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    # Back in the default layout, so that all that follows is the same for every recipe.
    model.eval().to(memory_format=torch.contiguous_format)


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    if recipe.milestones:
        return MultiStepLR(optimizer, [steps * m for m in recipe.milestones], gamma=0.2)
    return OneCycleLR(optimizer, recipe.lr, total_steps=steps * recipe.epochs, pct_start=0.25)


def _tensors(data: Dataset[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(data, Subset):
        pixels, labels = _tensors(data.dataset)
        chosen = torch.tensor(data.indices, device=labels.device)
        return pixels[chosen], labels[chosen]
    assert isinstance(data, TensorDataset)
    pixels, labels = data.tensors
    return pixels, labels
