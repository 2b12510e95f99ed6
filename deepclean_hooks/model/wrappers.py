"""The module a user wrapped: `DistributedDataParallel`, `DataParallel` and `torch.compile` taken
off."""

from __future__ import annotations

from torch import nn

# By name: neither is imported for this.
_REFUSED = {
    "FullyShardedDataParallel": "(FSDP1) flattens parameters into one-dimensional shards, so no "
    "entry can be named or held; use fully_shard() (FSDP2), or unlearn before wrapping",
    "DeepSpeedEngine": "steps flattened copies of the weights, which no mask of the weights can "
    "hold; use DistributedDataParallel or fully_shard() (FSDP2)",
}


def unwrap(model: nn.Module) -> nn.Module:
    """The innermost module, whose `named_parameters` names are the names used everywhere here.

    Raises ValueError for FSDP1 and DeepSpeed, under which no entry can be named or held.
    """
    for module in model.modules():
        if type(module).__name__ in _REFUSED:
            raise ValueError(f"{type(module).__name__} {_REFUSED[type(module).__name__]}")
    while True:
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
