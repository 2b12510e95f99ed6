"""What holding the frozen entries costs: the time of a guarded training step over a plain one.

    OMP_NUM_THREADS=1 python -m benchmarks.guard [--json FILE]
    python -m benchmarks.guard --device cuda [--json FILE]

Plain and guarded steps (forward, backward, optimizer step) are run in turn in one process; the
ratio is the median over repeats of the quickest step of each. 10 % of the entries are free, and in
the rows of the compact mode 1, 5 and 20 % as well. On a CPU time is the process's own, so that
other jobs of the machine do not count: it needs one thread. On a GPU it is the wall clock's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lab.models import Network, of_device, resnet18, timm_model
from benchmarks.lab.passes import MIB
from benchmarks.lab.results import write
from benchmarks.lab.timer import CPU, Timer, comparing
from deepclean_hooks.guard.guard import Guard

FREE = 0.1
COMPACT = (0.01, 0.05, 0.1, 0.2)
MODELS = {
    "resnet18": Network(resnet18, 32, 64),
    "vit_tiny": Network(timm_model("vit_tiny_patch16_224", img_size=64), 64, 8),
    "vit_tiny, 224 pixels": Network(timm_model("vit_tiny_patch16_224"), 224, 8),
}
Row = dict[str, Any]
OPTIMIZERS = {"AdamW, fused": {"fused": True}, "AdamW, loop": {"foreach": False}}


def quickest(
    timer: Timer, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, n: int
) -> float:
    """Seconds of the quickest of n steps."""

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return min(timer.seconds(step) for _ in range(n))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer remembers."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def row(name: str, kind: str, share: float, compact: bool, settings: argparse.Namespace) -> Row:
    """The held step over the plain one; with `compact` by an optimizer of the free entries."""
    network, timer = of_device(settings.device, MODELS)[name], comparing(settings.device)
    model, ((x, y),) = network.made(1, device=settings.device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **OPTIMIZERS[kind])
    free = {n: torch.rand(p.shape) < share for n, p in model.named_parameters() if p.dim() > 1}
    quickest(timer, model, optimizer, x, y, 2)
    ratios, plain, remembered = [], [], state_bytes(optimizer)
    for _ in range(settings.repeats):
        before = quickest(timer, model, optimizer, x, y, settings.steps)
        with Guard(model, free, clear_optimizer_state=False) as guard:
            used = optimizer
            if compact:
                used = torch.optim.AdamW(guard.compact().values(), lr=1e-5, **OPTIMIZERS[kind])
            held = quickest(timer, model, used, x, y, settings.steps)
            guard.check()
            remembered = state_bytes(used)
        after = quickest(timer, model, optimizer, x, y, settings.steps)
        plain.append((before + after) / 2)
        ratios.append(held / plain[-1])
    return {
        "model": name,
        "image": network.size,
        "batch": len(y),
        "optimizer": kind,
        "compact": compact,
        "entries": sum(p.numel() for p in model.parameters()),
        "free_fraction": share,
        "plain_ms": 1000 * statistics.median(plain),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "state_mib": remembered / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default=CPU, type=torch.device)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name, kind in itertools.product(
        options.models or of_device(options.device, MODELS), OPTIMIZERS
    ):
        for share, compact in [(FREE, False), *((share, True) for share in COMPACT)]:
            rows.append(row(name, kind, share, compact, options))
            print(
                "{model:10} {optimizer:14} {free_fraction:4.0%} free, compact {compact!s:5} "
                "{plain_ms:7.0f} ms   ratio {ratio:.3f} [{ratio_min:.3f}, {ratio_max:.3f}]   "
                "state {state_mib:5.1f} MiB".format(**rows[-1]),
                flush=True,
            )
            if options.json:
                write(options.json, rows=rows)


if __name__ == "__main__":
    main()
