"""Peak memory of the exact Fisher diagonal over that of a plain forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--json FILE]

Each is run in a process of its own; what counts is the peak above the process with the model and
the batches loaded and the libraries warm: both ways have run on two samples before, because
kernels and caches that stay loaded are 20 to 50 MiB. Freed memory goes back to the system at once
(a fixed MALLOC_MMAP_THRESHOLD_), because what the allocator happens to keep is up to 60 MiB; what
is left of that moves the ratio by 3 % from run to run, so the median of several is told. The probe
and the self-check of our first batch are within. The result itself (8 bytes an entry) is given
beside the rest.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from deepclean_hooks import measure
from deepclean_hooks.persample.engine import SquaredGradients
from fisher import MODELS, exact, plain
from result_file import write

MIB = 2**20


def peak() -> int:
    """The process's highest resident memory so far, in bytes.

    Not getrusage's ru_maxrss, which a process takes over from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; this benchmark needs Linux")


def resident() -> int:
    """The process's resident memory now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def grown(name: str, what: str) -> None:
    """Prints by how many bytes the peak rises above the loaded model and batches."""
    build, size, batch_size = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    batches = [
        (torch.randn(batch_size, 3, size, size), torch.randint(0, 10, (batch_size,)))
        for _ in range(3)
    ]
    with measure.no_trace(model):
        parameters = dict(model.named_parameters())
        few = [(x[:2], y[:2]) for x, y in batches[:1]]
        plain(model, few)
        exact(SquaredGradients(model, parameters), few)
        # Forget the peak of building the model: torchvision's VGG is made with its large head.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()
        if what == "plain":
            plain(model, batches)
        else:
            exact(SquaredGradients(model, parameters), batches)
        print(peak() - before)


def measured(name: str, what: str, repeats: int) -> float:
    """The median over processes of their own, in bytes."""
    return statistics.median(in_own_process(name, what) for _ in range(repeats))


def in_own_process(name: str, what: str) -> int:
    command = [sys.executable, __file__, "--one", name, what]
    returning = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=returning)
    return int(ran.stdout.split()[-1])


def row(name: str, repeats: int) -> dict[str, Any]:
    entries = sum(p.numel() for p in MODELS[name][0]().parameters())
    base, ours = (measured(name, what, repeats) for what in ("plain", "exact"))
    return {
        "model": name,
        "entries": entries,
        "plain_mib": base / MIB,
        "exact_mib": ours / MIB,
        "result_mib": 8 * entries / MIB,
        "ratio_beside_the_result": (ours - 8 * entries) / base,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        grown(*options.one)
        return
    rows = []
    for name in options.models:
        rows.append(row(name, options.repeats))
        print(
            "{model:24} plain {plain_mib:6.0f} MiB   exact {exact_mib:6.0f} MiB, of which result "
            "{result_mib:6.0f}   ratio beside it {ratio_beside_the_result:.2f}".format(**rows[-1]),
            flush=True,
        )
    if options.json:
        write(options.json, rows=rows)


if __name__ == "__main__":
    main()
