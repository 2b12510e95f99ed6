"""Peak memory of each process of a Fisher pass: one process, and two that share the model (FSDP2).

    OMP_NUM_THREADS=1 python -m benchmarks.sharded [--json FILE]

What counts is the peak above what the process has before the model is built: weights, sums and all
that is made on the way. The model is built layer by layer and sharded as it grows, as a model that
fits no single process must be.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

from benchmarks.lab.passes import MIB
from benchmarks.lab.processes import launch
from benchmarks.lab.results import write
from benchmarks.lab.timer import Timer
from benchmarks.memory import peak, resident
from deepclean_hooks import fisher_diagonal

WIDTH, DEPTH, CLASSES, SAMPLES, BATCH = 2048, 24, 10, 32, 16


def model(sharded: bool) -> nn.Module:
    """A perceptron of 24 layers of 2048 x 2048, 101 million entries."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        if sharded:
            fully_shard(layers[-2])
    layers.append(nn.Linear(WIDTH, CLASSES))
    made = nn.Sequential(*layers)
    return fully_shard(made) if sharded else made


def worker(accumulate: str) -> None:
    """Prints what this process needed, in bytes, and for how long."""
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    data = TensorDataset(x, torch.randint(0, CLASSES, (SAMPLES,), generator=generator))
    # What the first collective and the first product load is no part of the model.
    small = nn.Sequential(nn.Linear(WIDTH, CLASSES))
    few = TensorDataset(*data[:4])
    fisher_diagonal(fully_shard(small) if world > 1 else small, few, progress=False)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    made = model(world > 1)
    weights = peak() - before
    Path("/proc/self/clear_refs").write_text("5")
    with Timer().spent() as seconds:
        found = fisher_diagonal(
            made, data, batch_size=BATCH, accumulate=getattr(torch, accumulate), progress=False
        )
    total = sum(float(t.to_local().sum() if world > 1 else t.sum()) for t in found.sums.values())
    result = {"peak": peak() - before, "model": weights, "seconds": seconds[0], "sum": total}
    print(json.dumps({**result, "entries": sum(p.numel() for p in made.parameters())}))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def launched(world: int, accumulate: str) -> list[dict[str, Any]]:
    """What each of `world` processes printed."""
    # What is freed goes back: glibc would keep it, and the peak be that of its fragments.
    glibc = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_ARENA_MAX": "1"}
    told = launch("benchmarks.sharded", "--one", accumulate, world=world, **glibc)
    return [json.loads(line) for line in told]


def row(accumulate: str) -> dict[str, Any]:
    """One process against two, with sums of this dtype."""
    (alone,) = launched(1, accumulate)
    shared = launched(2, accumulate)
    sums = sum(one["sum"] for one in shared)
    return {
        "accumulate": accumulate,
        "entries": alone["entries"],
        "one_process_mib": alone["peak"] / MIB,
        "each_of_two_mib": [one["peak"] / MIB for one in shared],
        "two_together_mib": sum(one["peak"] for one in shared) / MIB,
        "share_of_one_process": max(one["peak"] for one in shared) / alone["peak"],
        "weights_one_process_mib": alone["model"] / MIB,
        "weights_each_of_two_mib": [one["model"] / MIB for one in shared],
        "seconds_one_process": alone["seconds"],
        "seconds_two": max(one["seconds"] for one in shared),
        "relative_difference_of_all_sums": abs(sums - alone["sum"]) / alone["sum"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", metavar="ACCUMULATE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        worker(options.one)
        return
    rows = []
    for accumulate in ("float64", "float32"):
        rows.append(row(accumulate))
        print(json.dumps(rows[-1], indent=2), flush=True)
    if options.json:
        allocator = "glibc, blocks of 256 KiB and more given back when freed"
        sizes = {"width": WIDTH, "depth": DEPTH, "samples": SAMPLES, "batch_size": BATCH}
        settings = {"allocator": allocator, **sizes}
        write(options.json, settings=settings, rows=rows)


if __name__ == "__main__":
    main()
