"""Python in processes of its own: several as `torchrun` would start them, or one that may die."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
Results = list[dict[str, Any]]


def environment(**more: str) -> dict[str, str]:
    """One thread a process, the checkout importable, loopback only."""
    paths = os.pathsep.join(map(str, (TESTS, ROOT, ROOT / "examples")))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    return {**kept, "PYTHONPATH": paths, **fixed, **more}


def launch(*command: str, world: int = 2, **more: str) -> list[str]:
    """Runs a Python command in `world` processes as torchrun would; their standard outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **address, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [one.communicate(timeout=300) for one in running]
    finally:
        for one in running:
            one.kill()
            one.wait()
    assert [one.returncode for one in running] == [0] * world, outputs
    return [out for out, _ in outputs]


def found_by_ranks(worker: str, folder: Path) -> Results:
    """What each of two ranks stored when it ran a worker script of this folder."""
    launch(str(TESTS / "lab" / f"{worker}.py"), str(folder))
    # Written by the test itself a moment ago.
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def in_child(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a Python command on one thread in a process of its own, which can import the tests of
    `folder`."""
    paths = os.pathsep.join(map(str, (folder, TESTS, ROOT)))
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def each(results: Results, name: str) -> Results:
    """A check's findings by rank, which must not be errors."""
    found = [one[name] for one in results]
    assert not any("error" in one for one in found), found
    return found


def worst(sums: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest error relative to a tensor's largest entry."""
    return max(
        float((sums[n] - t).abs().max() / t.abs().max().clamp_min(1e-300)) for n, t in truth.items()
    )
