"""A benchmark in processes of its own, which print what they measured."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from benchmarks.lab.results import ROOT


def launch(module: str, *words: str, world: int = 1, **environment: str) -> list[str]:
    """The last line that each of `world` processes printed, which run a module of ours on one
    thread each; several know each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    fixed = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **address, **environment}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=ROOT,
            env={**os.environ, **fixed, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate()[0] for process in running]
    for process in running:
        if process.returncode:
            raise RuntimeError(f"a process of {world} ended with {process.returncode}")
    return [output.splitlines()[-1] if output else "" for output in outputs]
