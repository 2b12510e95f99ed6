"""The clock of a benchmark, and how long work takes by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MEANING = "processor seconds of all threads on a CPU, wall-clock seconds on a GPU"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timer:
    """Wall-clock seconds until a device has done the work, or the process's processor seconds.

    Processor seconds leave out what other jobs on the machine take. They are of no use where work
    is shared by several processes, and say nothing of a GPU.
    """

    device: torch.device = CPU
    processor: bool = False

    @property
    def clock(self) -> str:
        """The clock by its name in `time`, for the JSON file."""
        return "process_time" if self.processor else "perf_counter"

    def now(self) -> float:
        """What the clock shows once the device has done all that it was given."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        return time.process_time() if self.processor else time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """What the work takes."""
        with self.spent() as spent:
            work()
        return spent[0]

    @contextmanager
    def spent(self) -> Iterator[list[float]]:
        """Yields a list that holds the seconds of the block once it has ended."""
        spent: list[float] = []
        start = self.now()
        yield spent
        spent.append(self.now() - start)


def comparing(device: str | torch.device) -> Timer:
    """The clock for works that are compared with each other: processor seconds on a CPU,
    wall-clock seconds on a GPU."""
    device = torch.device(device)
    return Timer(device, processor=device.type == "cpu")


def warm_up() -> None:
    """Pays what only the first work of a process would: imports that torch puts off until the first
    step of an optimizer."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
