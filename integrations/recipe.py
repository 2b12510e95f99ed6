"""`unlearn(model, forget, retain, ...)`: the paper's fine-tuning recipe, for those without a loop of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from deepclean_hooks import batches, losses, measure, ranks
from deepclean_hooks.integrations.loop import unlearning
from deepclean_hooks.measure import Data
from deepclean_hooks.methods.method import Method
from deepclean_hooks.report import Report
from deepclean_hooks.wrappers import unwrap


def unlearn(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    method: Method,
    epochs: int = 3,
    lr: float = 1e-3,
    batch_size: int | None = None,
    collate_fn: Any = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Report:
    """Unlearns in place and returns the report: Adam, cosine annealing to 0, cross-entropy, no augmentation of ours.

    `retain` is walked in shuffled order (by `seed`) in batches of `batch_size`, by default the loader's own or 64.
    Three epochs at 1e-3 are the paper's values for CIFAR. `options` are those of `unlearning`: test=, gold=, ...
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be a positive whole number, got {epochs!r}")
    if ranks.world()[1] > 1:
        raise RuntimeError(
            f"unlearn() trains in one process, {ranks.world()[1]} were launched; launch one, or use "
            "unlearning() around a distributed loop of your own"
        )
    loader = measure.samples(
        retain, name="retain", batch_size=batch_size, collate_fn=collate_fn
    ).shuffled(seed)
    with unlearning(
        model,
        forget=forget,
        retain=retain,
        method=method,
        batch_size=batch_size,
        collate_fn=collate_fn,
        progress=progress,
        **options,
    ) as run:
        _fine_tune(model, loader, run.loss_fn, epochs, lr, progress)
    return run.report


def _fine_tune(
    model: nn.Module,
    retain: DataLoader[Any],
    loss_fn: losses.LossFn,
    epochs: int,
    lr: float,
    progress: bool,
) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    steps = epochs * len(retain)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    device = measure.device_of(unwrap(model))
    hidden = None if progress else True
    with measure.training(model), tqdm(total=steps, desc="fine-tune", disable=hidden) as bar:
        for _ in range(epochs):
            for batch in retain:
                batch = batches.to(batch, device)
                loss = losses.per_sample(loss_fn(model, batch), batches.size(batch)).mean()
                loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
