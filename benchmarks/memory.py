"""Peak memory of the exact Fisher diagonal over that of a plain forward and backward.

    OMP_NUM_THREADS=1 python -m benchmarks.memory [--json FILE]

Each is run in a process of its own; what counts is the peak above the process with the model and
the batches loaded and the libraries warm: both ways have run on two samples before, because
kernels and caches that stay loaded are 20 to 50 MiB. Told twice: what torch allocates, which is the
same in every run, and what the process holds of the machine's memory. There freed memory goes back
to the system at once (a fixed MALLOC_MMAP_THRESHOLD_), because what the allocator happens to keep
is up to 60 MiB; what is left of that moves the ratio by 3 % from run to run, so it is the median of
several. The probe and the self-check of our first batch are within. The result itself (8 bytes an
entry) is given beside the rest.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.lab.models import ON_CPU
from benchmarks.lab.passes import MIB, exact, plain
from benchmarks.lab.processes import launch
from benchmarks.lab.results import write
from deepclean_hooks.model import no_trace
from deepclean_hooks.persample.engine import SquaredGradients


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


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that torch had allocated at a time during the work, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in sizes))


def grown(name: str, what: str, where: str) -> None:
    """Prints by how many bytes the peak rises above the loaded model and batches."""
    model, batches = ON_CPU[name].made(3)
    with no_trace.no_trace(model):
        parameters = dict(model.named_parameters())
        few = [(x[:2], y[:2]) for x, y in batches[:1]]
        plain(model, few)
        exact(SquaredGradients(model, parameters), few)

        def work() -> None:
            if what == "plain":
                plain(model, batches)
            else:
                exact(SquaredGradients(model, parameters), batches)

        if where == "torch":
            print(allocated(work))
            return
        # Forget the peak of building the model: torchvision's VGG is made with its large head.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()
        work()
        print(peak() - before)


def in_own_process(name: str, what: str, where: str) -> int:
    returning = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    return int(launch("benchmarks.memory", "--one", name, what, where, **returning)[0])


def row(name: str, repeats: int) -> dict[str, Any]:
    entries = sum(p.numel() for p in ON_CPU[name].build().parameters())
    found: dict[str, Any] = {"model": name, "entries": entries, "result_mib": 8 * entries / MIB}
    for where, times in (("torch", 1), ("process", repeats)):
        base, ours = (
            statistics.median(in_own_process(name, what, where) for _ in range(times))
            for what in ("plain", "exact")
        )
        found[where] = {
            "plain_mib": base / MIB,
            "exact_mib": ours / MIB,
            "ratio_beside_the_result": (ours - 8 * entries) / base,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(ON_CPU))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        grown(*options.one)
        return
    rows = []
    for name in options.models:
        rows.append(row(name, options.repeats))
        for where in ("torch", "process"):
            print(
                "{model:24} {where:8} plain {plain_mib:6.0f} MiB   exact {exact_mib:6.0f} MiB, of "
                "which result {result_mib:6.0f}   ratio beside it "
                "{ratio_beside_the_result:.2f}".format(where=where, **rows[-1], **rows[-1][where]),
                flush=True,
            )
        if options.json:
            write(options.json, rows=rows)


if __name__ == "__main__":
    main()
