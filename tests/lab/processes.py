"""Python in processes of its own: several as `torchrun` would start them, or one that may die."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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


def torchrun(script: Path, *words: str) -> str:
    """Runs a script in two processes as its reader would; its standard output."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = in_child("-m", *launcher, str(script), *words, folder=script.parent, timeout=500)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a function of a module returns for each rank, which it is given."""
    torch.multiprocessing.spawn(_on_rank, (work, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def _on_rank(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        torch.save(work(rank), Path(folder, f"rank{rank}.pt"))
    finally:
        dist.destroy_process_group()


def in_child(
    *command: str, folder: Path = TESTS, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs a Python command on one thread in a process of its own, which can import what is in
    `folder`."""
    return subprocess.run(
        [sys.executable, *command],
        env=environment(PYTHONPATH=os.pathsep.join(map(str, (folder, TESTS, ROOT)))),
        capture_output=True,
        text=True,
        timeout=timeout,
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
