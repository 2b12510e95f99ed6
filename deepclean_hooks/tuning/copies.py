"""What one selection would do, tried on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deepclean_hooks.guard.guard import Guard, NormStatistics
from deepclean_hooks.model import no_trace

FineTune = Callable[[nn.Module], object]
"""Trains the model it is given on the retain set; its optimizers are held to W_f."""


def zeroed(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with the selected entries at 0, in eval mode; the model stays as it is.

    Autocast that a library wrapped around `forward` is not copied with it.
    """
    with no_trace.no_trace(model) as inner:
        trial = copy.deepcopy(inner)
    trial.zero_grad(set_to_none=True)
    weights = dict(trial.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].masked_fill_(mask, 0)
    no_trace.drop_caches(trial)
    return trial


def tune(
    trial: nn.Module,
    masks: Mapping[str, Tensor],
    fine_tune: FineTune,
    norm_statistics: NormStatistics,
) -> None:
    """Trains a copy with everything but the selected entries held, and lets go of it.

    Raises GuardError if a frozen entry moved.
    """
    guard = Guard(
        trial,
        dict(masks),
        norm_statistics=norm_statistics,
        clear_optimizer_state=True,
        optimizers=(),
    )
    try:
        fine_tune(trial)
        guard.check()
    finally:
        guard.release()
