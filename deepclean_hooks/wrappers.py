"""The module a user wrapped: `DistributedDataParallel`, `DataParallel` and `torch.compile` taken
off."""

from __future__ import annotations

from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The innermost module, whose `named_parameters` names are the names used everywhere here.

    Raises ValueError for FSDP1, whose flattened one-dimensional shards have no weight matrix left
    to measure.
    """
    while True:
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) flattens parameters into one-dimensional "
                "shards, so no entry can be named or held; measure and unlearn before wrapping"
            )
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]  # checked on the line above
        elif isinstance(
            model, nn.parallel.DistributedDataParallel | nn.DataParallel
        ) and isinstance(model.module, nn.Module):
            model = model.module
        else:
            return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; a tied parameter appears once, under its
    first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name: what a digest of the model covers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def require_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; raises ValueError if there are none."""
    found = trainable(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: requires_grad is False for all "
            f"{sum(1 for _ in model.parameters())}; call requires_grad_(True) on those that may be "
            "unlearned"
        )
    return found
