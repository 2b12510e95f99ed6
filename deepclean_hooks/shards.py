"""Parameters that FSDP2 spreads over the ranks: the part that lies on this one."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """The plain tensor on this rank, in the same memory: a DTensor's shard, any other itself."""
    tensor = tensor.detach()
    sharded = _loaded("torch.distributed.tensor", "DTensor")
    if sharded is not None and isinstance(tensor, sharded):
        shard: Tensor = tensor.to_local()
        return shard
    return tensor


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """The entries of `full` that belong to this rank's shard of `like`, on the device of `like`.

    Nothing is sent: every rank cuts its own part, so all of them must hold the same `full`.
    """
    full = full.to(like.device)
    sharded = _loaded("torch.distributed.tensor", "DTensor")
    if sharded is not None and isinstance(like, sharded):
        distribute = _loaded("torch.distributed.tensor", "distribute_tensor")
        return local(distribute(full, like.device_mesh, like.placements, src_data_rank=None))
    return full


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (or tensor parallelism) has spread a parameter of the model over the ranks."""
    sharded = _loaded("torch.distributed.tensor", "DTensor")
    return sharded is not None and any(isinstance(p, sharded) for p in model.parameters())


def refuse_sharded(model: nn.Module) -> None:
    """Raises ValueError for a sharded model: its gradients are averaged before any square."""
    if is_sharded(model):
        raise ValueError(
            f"the parameters of {type(model).__name__} are sharded (fully_shard, FSDP2): gradients "
            "come averaged over the ranks, and the Fisher diagonal needs the square of each "
            "sample's own; call measure(), select() and reset() before fully_shard() or "
            "Accelerator.prepare(), and guard() after"
        )


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, gathered over the ranks, all of which call this; others as is."""
    sharded = _loaded("torch.distributed.tensor", "DTensor")
    if sharded is not None and isinstance(tensor, sharded):
        gathered: Tensor = tensor.full_tensor()
        return gathered
    return tensor


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters back in their places under FSDP2; changes no other model.

    FSDP2 leaves its root unsharded after a forward pass, under parameters that are other objects.
    """
    sharded = _loaded("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules() if sharded is not None else ():
        if isinstance(module, sharded):
            module.reshard()


def _loaded(module: str, name: str) -> Any:
    # Not imported: that takes 0.5 s, and what was never imported has no instances.
    return getattr(sys.modules.get(module), name, None)
