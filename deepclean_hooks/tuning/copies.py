"""What one selection would do, tried on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deepclean_hooks.guard.guard import Guard, NormStatistics
from deepclean_hooks.measure.request import Measured
from deepclean_hooks.methods.method import Method, Selection
from deepclean_hooks.model import no_trace

Train = Callable[[nn.Module], object]
"""Trains the model it is given on the retain set; its optimizers are held to W_f."""


def reset(model: nn.Module, method: Method, selection: Selection, measured: Measured) -> nn.Module:
    """A copy of the model with the selected entries at the method's values, in eval mode; the model
    stays as it is.

    Autocast that a library wrapped around `forward` is not copied with it.
    """
    with no_trace.no_trace(model) as inner:
        trial = copy.deepcopy(inner)
    trial.zero_grad(set_to_none=True)
    with torch.no_grad():
        values = method.values(trial, selection, measured.forget, measured.retain)
    method.write(trial, selection, values)
    no_trace.drop_caches(trial)
    return trial


def tune(
    trial: nn.Module,
    free: Mapping[str, Tensor],
    train: Train,
    norm_statistics: NormStatistics,
) -> None:
    """Trains a copy with everything but the free entries held, and lets go of it.

    Raises GuardError if a frozen entry moved.
    """
    guard = Guard(
        trial,
        dict(free),
        norm_statistics=norm_statistics,
        clear_optimizer_state=True,
        optimizers=(),
    )
    try:
        train(trial)
        guard.check()
    finally:
        guard.release()
