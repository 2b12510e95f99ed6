"""The module a user wrapped: `DistributedDataParallel`, `DataParallel` and `torch.compile` taken
off."""

from __future__ import annotations

from torch import nn

# By name: neither is imported for this.
_REFUSED = {
    "FullyShardedDataParallel": "(FSDP1) flattens parameters into one-dimensional shards, so no "
    "entry can be named or held; use fully_shard() (FSDP2), or unlearn before wrapping",
    "_StatefulGraphModule": "(torch.export) is a traced program, without an eval mode and without "
    "the layers that it was made of; unlearn the module that it was exported from, and "
    "export that again",
    "DeepSpeedEngine": "steps flattened copies of the weights, which no mask of the weights can "
    "hold; use DistributedDataParallel or fully_shard() (FSDP2)",
}


def unwrap(model: nn.Module) -> nn.Module:
    """The innermost module, whose `named_parameters` names are the names used everywhere here.

    Raises TypeError for what is no module, ValueError for FSDP1 and DeepSpeed, under which no entry
    can be named or held, and for what is no model of this process: exported, offloaded, spread
    over devices, or not made yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model must be a torch.nn.Module, got {type(model).__name__}; put a function "
            "into the forward of a module that holds its parameters"
        )
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _REFUSED:
                raise ValueError(f"{kind.__name__} {_REFUSED[kind.__name__]}")
    _require_made(model)
    _require_trackable(model)
    _require_one_place(model)
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]  # checked on the line above
        elif isinstance(
            model, nn.parallel.DistributedDataParallel | nn.DataParallel
        ) and isinstance(model.module, nn.Module):
            model = model.module
        else:
            return model


def _require_made(model: nn.Module) -> None:
    lazy = [n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"{len(lazy)} parameters have no shape yet, for instance {lazy[:3]}: a lazy layer "
            "makes them in its first forward pass; call the model on a batch, and train it, before"
        )


def _require_trackable(model: nn.Module) -> None:
    made = [n for n, p in model.named_parameters() if p.is_inference()]
    if made:
        raise ValueError(
            f"{len(made)} parameters were made under torch.inference_mode(), for instance "
            f"{made[:3]}, and can have no gradient; make or load the model outside of it"
        )


def _require_one_place(model: nn.Module) -> None:
    places: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(str(parameter.device), []).append(name)
    if "meta" in places:
        names = places["meta"]
        raise ValueError(
            f"{len(names)} parameters are on the meta device and have no values here, for instance "
            f"{names[:3]}: the model is offloaded (accelerate, device_map) or was never loaded; "
            "load it whole onto one device, such as from_pretrained(...) without device_map="
        )
    if len(places) > 1:
        first = {place: names[0] for place, names in places.items()}
        raise ValueError(
            f"the parameters are spread over {sorted(places)}, for instance {first}; load the "
            "model onto one device (without device_map=), or shard it by fully_shard() (FSDP2)"
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; a tied parameter appears once, under its
    first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def require_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; raises ValueError if there are none."""
    parameters = trainable(model)
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: requires_grad is False for all "
            f"{sum(1 for _ in model.parameters())}; call requires_grad_(True) on those that may be "
            "unlearned"
        )
    return parameters
