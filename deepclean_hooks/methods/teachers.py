"""Networks that a method learns from, or away from: the original as it was, an untrained one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks.data import losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.model import no_trace


def frozen(model: nn.Module) -> nn.Module:
    """The model in eval mode, its parameters without gradients."""
    return model.eval().requires_grad_(False)


def softened(teacher: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """A teacher's log-probabilities at a temperature, (N, C), without gradient."""
    with torch.no_grad():
        logits, _ = losses.logits_and_labels(teacher, batch)
        return F.log_softmax(logits / temperature, 1)


def divergence(model: nn.Module, target: Tensor, batch: Batch, temperature: float) -> Tensor:
    """KL(target || model) of each sample, (N,), for log-probabilities at a temperature (N, C)."""
    logits, _ = losses.logits_and_labels(model, batch)
    log_p = F.log_softmax(logits / temperature, 1)
    return F.kl_div(log_p, target, reduction="none", log_target=True).sum(1)


def fresh(
    model: nn.Module, *, seed: int, build: Callable[[], nn.Module] | None = None
) -> nn.Module:
    """An untrained network of the same architecture on the same device; the model and the random
    state stay as they are.

    Raises ValueError, naming all of them, for parameters that no `reset_parameters` resets, and for
    a built network with other parameters.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        if build is not None:
            anew = build()
        else:
            anew = copy.deepcopy(model)
            _require_all_reset(anew)
            for module in anew.modules():
                reset = _own_reset(module)
                if reset is not None:
                    reset()
    shapes = {name: p.shape for name, p in anew.named_parameters()}
    wanted = {name: p.shape for name, p in model.named_parameters()}
    differ = sorted(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
    if differ:
        raise ValueError(
            f"build makes a network with other parameters, for instance {differ[:3]}; it must make "
            "the model's architecture"
        )
    return anew.to(no_trace.device_of(model))


def _own_reset(module: nn.Module) -> Callable[[], None] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # nn.MultiheadAttention has the second
        reset = getattr(module, name, None)
        if callable(reset):
            return reset  # type: ignore[no-any-return]  # by convention without arguments
    return None


def _require_all_reset(model: nn.Module) -> None:
    left = []
    for prefix, module in model.named_modules():
        if _own_reset(module) is None:
            left += [name for name, _ in module.named_parameters(prefix, recurse=False)]
    if left:
        raise ValueError(
            f"no reset_parameters() resets {', '.join(left)}; pass Retrain(build=...), a function "
            "that makes an untrained network"
        )
