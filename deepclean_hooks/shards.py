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
