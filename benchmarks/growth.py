"""How the cost of the exact Fisher diagonal grows: with the batch, the parameters, the image, the
threads and the processes.

    OMP_NUM_THREADS=1 python -m benchmarks.growth [--only batch ...] [--json FILE]
    python -m benchmarks.growth --only threads processes --json FILE     # needs two idle cores

Batch, parameters and image: the ratio to a plain forward and backward of the same batches, as in
fisher.py. Threads: seconds of both with one and two threads. Processes: seconds of one Fisher pass
over the same set by one and by two processes of one thread each (gloo), the ranks' sums included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.lab.models import Network
from benchmarks.lab.passes import exact, plain
from benchmarks.lab.processes import launch
from benchmarks.lab.results import read, write
from benchmarks.lab.timer import Timer
from deepclean_hooks import fisher_diagonal
from deepclean_hooks.model import no_trace
from deepclean_hooks.persample.engine import SquaredGradients
from examples.cifar10 import ResNet

Row = dict[str, Any]
SAMPLES = 2048  # of the set that the processes share


def resnet(width: int = 16) -> nn.Module:
    return ResNet(20, (width, 2 * width, 4 * width)).eval()


def ratio(timer: Timer, width: int = 16, size: int = 32, batch: int = 32, repeats: int = 3) -> Row:
    """The smallest plain and exact seconds of two batches, in turn, and their ratio."""
    model, batches = Network(lambda: resnet(width), size, batch).made(2)
    by_plain, by_exact = [], []
    with no_trace.no_trace(model):
        engine = SquaredGradients(model, dict(model.named_parameters()))
        engine.plan_for(batches[0])
        plain(model, batches[:1])
        for _ in range(repeats):
            by_plain.append(timer.seconds(lambda: plain(model, batches)))
            by_exact.append(timer.seconds(lambda: exact(engine, batches)))
    return {
        "entries": sum(p.numel() for p in model.parameters()),
        "image": size,
        "batch": batch,
        "plain_seconds": min(by_plain),
        "exact_seconds": min(by_exact),
        "ratio": min(by_exact) / min(by_plain),
    }


def batch(timer: Timer) -> list[Row]:
    return [ratio(timer, batch=n) for n in (8, 32, 128)]


def parameters(timer: Timer) -> list[Row]:
    return [ratio(timer, width) for width in (8, 16, 32, 64)]


def image(timer: Timer) -> list[Row]:
    return [ratio(timer, size=size) for size in (16, 32, 64)]


def threads(timer: Timer) -> list[Row]:
    rows = []
    for count in (1, 2):
        torch.set_num_threads(count)
        rows.append({"threads": count, **ratio(timer, width=32)})
    return rows


def processes(timer: Timer) -> list[Row]:
    """The pass over the whole set, by one and by two processes of one thread each."""

    def seconds(count: int) -> float:
        return float(launch("benchmarks.growth", "--rank", world=count)[0])

    return [
        {"processes": count, "samples": SAMPLES, "seconds": min(seconds(count) for _ in range(3))}
        for count in (1, 2)
    ]


def rank() -> None:
    """What each process runs; it prints the seconds of the second pass."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 3, 32, 32, generator=generator)
    data = TensorDataset(x, torch.randint(0, 10, (SAMPLES,), generator=generator))
    torch.manual_seed(0)
    model = resnet()

    def once() -> None:
        fisher_diagonal(model, data, batch_size=32, progress=False)
        dist.barrier()

    once()
    print(Timer().seconds(once))
    dist.destroy_process_group()


KINDS: dict[str, Callable[[Timer], list[Row]]] = {
    "batch": batch,
    "parameters": parameters,
    "image": image,
    "threads": threads,
    "processes": processes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--cpu-time", action="store_true", help="processor instead of wall time")
    parser.add_argument("--json", type=Path, help="kinds that it holds already are kept")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank()
        return
    timer = Timer(processor=options.cpu_time)
    known = options.json is not None and options.json.exists()
    stored = read(options.json) if known else {}
    told = {key: stored[key] for key in ("clocks", *KINDS) if key in stored}
    told.setdefault("clocks", {})
    for kind in options.only:
        told[kind] = KINDS[kind](timer)
        # Processor time is of no use where several processes share the work.
        told["clocks"][kind] = (Timer() if kind == "processes" else timer).clock
        print(kind, *(json.dumps(row) for row in told[kind]), sep="\n  ", flush=True)
        if options.json:
            write(options.json, **told)


if __name__ == "__main__":
    main()
