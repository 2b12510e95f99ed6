"""Everything that speaks torch.distributed: who we are, which samples are ours, sums over all
ranks."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) where no process group is initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this process is rank 0, the one that prints and writes files."""
    return world()[0] == 0


def share(count: int) -> range:
    """The positions of this rank among `count` samples: rank, rank + world, ...

    Not DistributedSampler: it repeats samples until the ranks are even, and a repeated sample
    counts twice.
    """
    rank, ranks = world()
    return range(rank, count, ranks)


def sum_over_ranks(tensors: dict[str, Tensor]) -> None:
    """Adds every tensor over all ranks, in place; all ranks must hold the same names and shapes."""
    if world()[1] > 1:
        for name in sorted(tensors):
            dist.all_reduce(tensors[name])


def gather(value: T) -> list[T]:
    """The picklable value of each rank, in the order of the ranks."""
    ranks = world()[1]
    if ranks == 1:
        return [value]
    values: list[T | None] = [None] * ranks
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # every place was filled by the gather


def require_agreement(what: str, value: str) -> None:
    """Raises RuntimeError on every rank if the ranks hold different values; `what` names the thing
    compared."""
    values = gather(value)
    if len(set(values)) > 1:
        raise RuntimeError(
            f"{what} differs between ranks: {values}; give every rank the same model, data sets "
            "and settings"
        )


def barrier_device() -> torch.device:
    """The device on which collectives of the default group work: CUDA under NCCL, otherwise the
    CPU."""
    if world()[1] > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
