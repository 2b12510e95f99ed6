"""Parameters that FSDP2 spreads over the ranks: the part that lies on this one, and sums over them.

What is measured of such a model is sharded as its parameters are, in tensors of the same kind: they
compare and combine entry by entry, each rank its own part. Their own `sum`, `max`, `any` and `all`,
read as a number, give that of this rank alone; `total`, `largest` and `any_true` that of the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepclean_hooks.ranks import collectives as ranks


def is_shard(tensor: object) -> bool:
    """Whether it is a DTensor, of which this rank may have only a part."""
    sharded = loaded("torch.distributed.tensor", "DTensor")
    return sharded is not None and isinstance(tensor, sharded)


def local(tensor: Tensor) -> Tensor:
    """The plain tensor on this rank, in the same memory: a DTensor's shard, any other itself."""
    tensor = tensor.detach()
    if is_shard(tensor):
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]  # of a DTensor
        return shard
    return tensor


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """The entries of `full` that belong to this rank's shard of `like`, on the device of `like`.

    Nothing is sent: every rank cuts its own part, so all of them must hold the same `full`, or its
    part already where `full` is sharded too.
    """
    if is_shard(full):
        return local(full)
    full = full.to(like.device)
    if is_shard(like):
        distribute = loaded("torch.distributed.tensor", "distribute_tensor")
        where: Any = like
        return local(distribute(full, where.device_mesh, where.placements, src_data_rank=None))
    return full


def sharded_as(part: Tensor, like: Tensor) -> Tensor:
    """This rank's part as a tensor sharded like `like`, in the same memory; itself if `like` is
    not sharded."""
    if not is_shard(like):
        return part
    where: Any = like
    made: Tensor = loaded("torch.distributed.tensor", "DTensor").from_local(
        part,
        where.device_mesh,
        where.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return made


def cut(full: Tensor, like: Tensor | None) -> Tensor:
    """This rank's shard of `full` with memory of its own, sharded like `like` and on its device;
    `full` itself if that is not sharded or there is none."""
    if like is None or not is_shard(like) or is_shard(full):
        return full
    part = local_part(full.to(like.device), like)
    return sharded_as(part.clone(), like)  # a view would keep all of `full`


def summed_part(full: Tensor, like: Tensor) -> Tensor:
    """The sum over the ranks of their `full` tensors, of which this rank gets its shard of `like`;
    `full` itself if `like` is not sharded. All ranks call this."""
    if not is_shard(like):
        return full
    where: Any = like
    partial = loaded("torch.distributed.tensor", "Partial")
    made = loaded("torch.distributed.tensor", "DTensor").from_local(
        full.contiguous(), where.device_mesh, [partial()] * where.device_mesh.ndim, run_check=False
    )
    return local(made.redistribute(placements=where.placements))


def total(tensor: Tensor) -> int:
    """The sum of a bool or integer tensor over all its shards; all ranks call this."""
    return int(_over_shards(tensor, "sum", local(tensor).sum(dtype=torch.int64)))


def counted(counts: Mapping[str, int], like: Mapping[str, Tensor]) -> dict[str, int]:
    """Counts by the name of a tensor, of all shards together; all ranks call this.

    What is not sharded is the same on every rank, so the largest of the ranks' counts stands.
    """
    everyone = ranks.gather(dict(counts))
    names = sorted({name for part in everyone for name in part})
    return {
        name: (sum if name in like and is_shard(like[name]) else max)(
            part.get(name, 0) for part in everyone
        )
        for name in names
    }


def largest(tensor: Tensor) -> float:
    """The largest entry of a floating-point tensor over all its shards, -inf of none; all ranks
    call this."""
    here = local(tensor)
    top = here.max() if here.numel() else here.new_tensor(-torch.inf)
    return float(_over_shards(tensor, "max", top))


def any_true(mask: Tensor) -> bool:
    """Whether any entry of a bool tensor is True on any rank, all of which call this."""
    return total(mask) > 0


def _over_shards(tensor: Tensor, reduction: str, here: Tensor) -> Tensor:
    """A number of this rank's shard, summed (or the like) over the shards, each once."""
    if not is_shard(tensor):
        return here
    where: Any = tensor
    partial = loaded("torch.distributed.tensor", "Partial")
    replicate = loaded("torch.distributed.tensor", "Replicate")
    made = loaded("torch.distributed.tensor", "DTensor").from_local(
        here.reshape(1),
        where.device_mesh,
        [replicate() if one.is_replicate() else partial(reduction) for one in where.placements],
        run_check=False,
    )
    return whole(made)[0]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, gathered over the ranks, all of which call this; others as is."""
    if is_shard(tensor):
        gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]  # of a DTensor
        return gathered
    return tensor


def loaded(module: str, name: str) -> Any:
    """A name of a module of torch, None where that module was never imported."""
    # Not imported: that takes 0.5 s, and what was never imported has no instances.
    return getattr(sys.modules.get(module), name, None)
