"""How the cost of the exact Fisher diagonal grows: with the batch, the parameters, the image, the
threads and the processes.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--only batch ...] [--json FILE]
    python benchmarks/growth.py --only threads processes --json FILE     # needs two idle cores

Batch, parameters and image: the ratio to a plain forward and backward of the same batches, as in
fisher.py. Threads: seconds of both with one and two threads. Processes: seconds of one Fisher pass
over the same set by one and by two processes of one thread each (gloo), the ranks' sums included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import fisher
from deepclean_hooks.model import no_trace
from deepclean_hooks.persample.engine import SquaredGradients
from result_file import write

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from cifar10 import ResNet  # noqa: E402  # found by the line above

Row = dict[str, Any]
SAMPLES = 2048  # of the set that the processes share


def ratio(model: nn.Module, size: int, batch: int, repeats: int = 3) -> Row:
    """The smallest plain and exact seconds of two batches, in turn, and their ratio."""
    torch.manual_seed(0)
    batches = [
        (torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))) for _ in range(2)
    ]
    plain, exact = [], []
    with no_trace.no_trace(model):
        engine = SquaredGradients(model, dict(model.named_parameters()))
        engine.plan_for(batches[0])
        fisher.plain(model, batches[:1])
        for _ in range(repeats):
            plain.append(fisher.timed(lambda: fisher.plain(model, batches)))
            exact.append(fisher.timed(lambda: fisher.exact(engine, batches)))
    return {
        "entries": sum(p.numel() for p in model.parameters()),
        "image": size,
        "batch": batch,
        "plain_seconds": min(plain),
        "exact_seconds": min(exact),
        "ratio": min(exact) / min(plain),
    }


def resnet(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(20, (width, 2 * width, 4 * width)).eval()


def batch() -> list[Row]:
    return [ratio(resnet(), 32, n) for n in (8, 32, 128)]


def parameters() -> list[Row]:
    return [ratio(resnet(width), 32, 32) for width in (8, 16, 32, 64)]


def image() -> list[Row]:
    return [ratio(resnet(), size, 32) for size in (16, 32, 64)]


def threads() -> list[Row]:
    rows = []
    for count in (1, 2):
        torch.set_num_threads(count)
        rows.append({"threads": count, **ratio(resnet(32), 32, 32)})
    return rows


def processes() -> list[Row]:
    """The pass over the whole set, by one and by two processes of one thread each."""
    return [
        {"processes": count, "samples": SAMPLES, "seconds": min(launched(count) for _ in range(3))}
        for count in (1, 2)
    ]


def launched(count: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={count}", __file__, "--rank"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread)
    return float(ran.stdout.split()[-1])


def rank() -> None:
    """What each process runs; rank 0 prints the seconds of the second pass."""
    from deepclean_hooks import fisher_diagonal

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 3, 32, 32, generator=generator)
    data = TensorDataset(x, torch.randint(0, 10, (SAMPLES,), generator=generator))
    model = resnet()

    def once() -> None:
        fisher_diagonal(model, data, batch_size=32, progress=False)

    once()
    dist.barrier()
    start = time.perf_counter()
    once()
    dist.barrier()
    seconds = time.perf_counter() - start
    if dist.get_rank() == 0:
        print(seconds)
    dist.destroy_process_group()


KINDS: dict[str, Callable[[], list[Row]]] = {
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
    if options.cpu_time:  # of no use where several threads or processes share the work
        fisher.clock = time.process_time
    known = options.json is not None and options.json.exists()
    stored = json.loads(options.json.read_text(encoding="utf-8")) if known else {}
    told = {key: stored[key] for key in ("clocks", *KINDS) if key in stored}
    told.setdefault("clocks", {})
    for kind in options.only:
        told[kind] = KINDS[kind]()
        told["clocks"][kind] = "perf_counter" if kind == "processes" else fisher.clock.__name__
        print(kind, *(json.dumps(row) for row in told[kind]), sep="\n  ", flush=True)
        if options.json:
            write(options.json, **told)


if __name__ == "__main__":
    main()
