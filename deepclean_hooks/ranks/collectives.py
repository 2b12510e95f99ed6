"""Everything that speaks torch.distributed: who we are, which samples are ours, sums over all
ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

# What an error on one rank is on the others, so that all of them catch it or none does.
_TOLD: tuple[type[Exception], ...] = (ValueError, TypeError, NotImplementedError)


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
    """Adds every tensor over all ranks, in place; all ranks must hold the same names and shapes.

    Row by row: collectives add memory to memory, and on a rank without samples, or with another
    rule, a sum may lie in memory in another order.
    """
    if world()[1] > 1:
        for name in sorted(tensors):
            own = tensors[name]
            sent = own.contiguous()
            dist.all_reduce(sent)
            if sent is not own:
                own.copy_(sent)


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
    require_same({what: value})


def require_same(values: Mapping[str, str]) -> None:
    """Raises RuntimeError on every rank, naming the first, if any of these differs between ranks;
    one exchange for all of them."""
    everyone = gather(dict(values))
    for what in dict.fromkeys(name for each in everyone for name in each):
        seen = [each.get(what, "nothing") for each in everyone]
        if len(set(seen)) > 1:
            raise RuntimeError(
                f"{what} differs between ranks: {seen}; give every rank the same model, data sets "
                "and settings"
            )


@contextmanager
def fail_together() -> Iterator[None]:
    """An error in the block on one rank is raised on all ranks; the block holds no collective.

    A rank that stopped alone would leave the others waiting. They get a ValueError, TypeError or
    NotImplementedError if the error was one, else a RuntimeError, which quotes it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as reason:
        failure = reason
    kind = next((kind for kind in _TOLD if isinstance(failure, kind)), RuntimeError)
    told = None if failure is None else (kind.__name__, str(failure))
    failed = [one for one in gather(told) if one is not None]
    if failure is not None:
        raise failure
    if failed:
        name, text = failed[0]
        error = next((kind for kind in _TOLD if kind.__name__ == name), RuntimeError)
        raise error(f"another rank failed: {text}")


def require_same_samples(name: str, indices: Sequence[int], content: Sequence[int]) -> None:
    """Raises RuntimeError on every rank if the set `name` is not the same one on all of them.

    Each rank takes its share of the positions: of different sets, samples would be left out or
    counted twice.
    """
    if world()[1] > 1:
        sha = hashlib.sha256(repr((tuple(indices), tuple(content))).encode()).hexdigest()
        require_agreement(f"the {name} set", f"{len(indices)} samples, SHA-256 {sha[:16]}")


def share_buffers(model: nn.Module) -> None:
    """Gives the buffers of every rank the values of rank 0.

    Running statistics drift apart under DistributedDataParallel, which keeps those of rank 0.
    """
    if world()[1] > 1:
        with torch.no_grad():
            for buffer in model.buffers():
                sent = buffer.detach().to(barrier_device()).contiguous()
                dist.broadcast(sent, 0)
                buffer.copy_(sent)


def refuse_lossy_reduction(model: nn.Module) -> None:
    """Raises ValueError for a DistributedDataParallel that compresses gradients by PowerSGD.

    Its low-rank approximation gives frozen entries gradients again, and made NaN of those of W_f.
    """
    for entry in getattr(model, "_comm_hooks", ()):
        name = getattr(entry[0], "__name__", "")
        if "powersgd" in name.lower():
            raise ValueError(
                f"the communication hook {name} mixes the gradients of frozen and free entries; "
                "reduce without PowerSGD (compression to bf16 or fp16 works)"
            )


def works_on_cpu() -> bool:
    """Whether there is a process group already and it is one for the CPU."""
    return bool(dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo")


def barrier_device() -> torch.device:
    """The device on which collectives of the default group work: CUDA under NCCL, otherwise the
    CPU."""
    if world()[1] > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
