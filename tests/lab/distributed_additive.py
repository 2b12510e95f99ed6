"""What each of the processes of test_adding_on_ranks.py does; `run_alone` is the same in one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import deepclean_hooks as deepclean
from lab.distributed_worker import full, perceptron, run_all, samples

DTYPE = torch.float64
RETAIN, HELD_OUT = samples(13, 49, DTYPE), samples(49, 64, DTYPE)
SELECT = deepclean.DeepClean(gamma=1.1)
METHODS: dict[str, deepclean.Method] = {
    "ReferenceGuided": deepclean.ReferenceGuided(HELD_OUT),
    "ReferenceGuided, mean": deepclean.ReferenceGuided(HELD_OUT, "mean"),
    "ReferenceGuided, reset": deepclean.ReferenceGuided(HELD_OUT, train=SELECT, reset=True),
    "NegGradPlus": deepclean.NegGradPlus(train=SELECT),
    "RandomLabel": deepclean.RandomLabel(train=SELECT),
    "Amnesiac": deepclean.Amnesiac(train=SELECT),
    "SalUn": deepclean.SalUn(),
    "BadTeaching": deepclean.BadTeaching(),
    "L1Sparse": deepclean.L1Sparse(epochs=2, steps_per_epoch=2, train=SELECT),
    "MSG": deepclean.MSG(),
}
BY_UNLEARN = ["ReferenceGuided", "RandomLabel", "L1Sparse", "BadTeaching"]
SHARDED = ["ReferenceGuided, reset", "NegGradPlus", "RandomLabel", "Amnesiac", "L1Sparse"]
COUNTS = (13, 1)  # forget samples: uneven on two ranks, and fewer than ranks
OPTIONS: dict[str, Any] = {"scores": False, "progress": False, "batch_size": 5}


def in_a_loop(name: str, count: int, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """A loop of one's own, of 4 steps with clipping; each rank its part of a batch of 8."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = perceptron().to(DTYPE)
    wrapped = wrap(model)
    sets = {"forget": samples(0, count, DTYPE), "retain": RETAIN}
    with deepclean.unlearning(wrapped, **sets, method=METHODS[name], **OPTIONS):
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
        wrapped.train()
        for step in range(4):
            chosen = list(range(8 * step + rank, 8 * step + 8, world))
            x, y = (tensor[chosen] for tensor in RETAIN.tensors)
            F.cross_entropy(wrapped(x), y).backward()
            nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return {name: full(p) for name, p in model.named_parameters()}


def by_unlearn(name: str) -> dict[str, Tensor]:
    """`unlearn`, called as in one process."""
    model = perceptron().to(DTYPE)
    options = {**OPTIONS, "batch_size": 12}
    sets: tuple[TensorDataset, TensorDataset] = (samples(0, 13, DTYPE), RETAIN)
    deepclean.unlearn(model, *sets, method=METHODS[name], steps=5, **options)
    return {name: full(p) for name, p in model.named_parameters()}


def plainly(model: nn.Module) -> nn.Module:
    """As it is."""
    return model


def sharded(model: nn.Module) -> nn.Module:
    """Under FSDP2."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[1])
    return fully_shard(model)


if __name__ == "__main__":
    ddp = nn.parallel.DistributedDataParallel
    checks: dict[str, Callable[[int], Any]] = {}
    for name in BY_UNLEARN:
        checks[f"unlearn {name}"] = lambda rank, name=name: by_unlearn(name)
    for name in METHODS:
        for count in COUNTS:
            checks[f"ddp {name} {count}"] = lambda rank, n=name, c=count: in_a_loop(n, c, ddp)
    for name in SHARDED:
        checks[f"sharded {name}"] = lambda rank, name=name: in_a_loop(name, 13, sharded)
    run_all(checks, Path(sys.argv[1]))
