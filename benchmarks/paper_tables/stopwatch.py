"""What a block of code costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MEANING = "processor seconds of all threads on a CPU, wall-clock seconds on a GPU"


@contextmanager
def stopwatch(device: str) -> Iterator[list[float]]:
    """Yields a list that holds the seconds of the block once it has ended.

    Processor time on a CPU: cells of one run are compared with each other, and other jobs on the
    machine must not enter.
    """
    spent: list[float] = []
    start = _now(device)
    yield spent
    spent.append(_now(device) - start)


def warm_up() -> None:
    """Pays what only the first cell of a process would: imports that torch puts off until the first
    step of an optimizer."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
