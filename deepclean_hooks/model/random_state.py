"""The random state of the process, left as it was by what draws from it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

PutBack = Callable[[], object]

_LOCK = threading.Lock()
_INSIDE: dict[int, int] = {}  # thread -> how many blocks it is in
_FIRST: list[PutBack] = []  # the state before the first of the threads that are inside


@contextmanager
def kept(*holders: object, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Puts back, at the end, what torch (on the CPU and these GPUs), numpy and random draw from.

    `holders` are objects such as samplers: the generators and the plain numbers among their
    attributes, such as the number of an epoch, are put back too. Where several threads are inside,
    the last puts back what was there before the first.
    """
    thread = threading.get_ident()
    with _LOCK:
        back = _process(devices)
        if not _INSIDE:
            _FIRST[:] = back
        _INSIDE[thread] = _INSIDE.get(thread, 0) + 1
        own = [put_back for holder in holders for put_back in _attributes(holder)]
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE[thread] -= 1
            if not _INSIDE[thread]:
                del _INSIDE[thread]
            if not _INSIDE:
                back = _FIRST
            elif set(_INSIDE) != {thread}:
                back = []
            for put_back in [*back, *own]:
                put_back()


def _process(devices: Sequence[torch.device]) -> list[PutBack]:
    gpus = [_gpu(device) for device in devices]
    return [_torch(torch.default_generator), _numpy(), _python(), *gpus]


def _gpu(device: torch.device) -> PutBack:
    state = torch.cuda.get_rng_state(device)
    return lambda: torch.cuda.set_rng_state(state, device)


def draw_others() -> None:
    """Seeds all three so that what is drawn next differs from what a fresh process would draw."""
    torch.default_generator.manual_seed(0x5EED)
    np.random.seed(0x5EED)
    random.seed(0x5EED)


def _attributes(holder: object) -> list[PutBack]:
    try:
        attributes = vars(holder)
    except TypeError:  # a list, a range
        return []
    back: list[PutBack] = []
    for name, value in list(attributes.items()):
        if value is None or isinstance(value, bool | int | float | str):
            back.append(lambda name=name, value=value: attributes.update({name: value}))  # type: ignore[misc]  # a lambda's defaults have no types
        elif isinstance(value, torch.Generator):
            back.append(_torch(value))
        elif isinstance(value, np.random.Generator):
            back.append(_bit_generator(value))
        elif isinstance(value, np.random.RandomState):
            back.append(_legacy(value))
        elif isinstance(value, random.Random):
            back.append(_random(value))
    return back


def _torch(generator: torch.Generator) -> PutBack:
    state = generator.get_state()
    return lambda: generator.set_state(state)


def _numpy() -> PutBack:
    state = np.random.get_state()
    return lambda: np.random.set_state(state)


def _python() -> PutBack:
    state = random.getstate()
    return lambda: random.setstate(state)


def _bit_generator(generator: np.random.Generator) -> PutBack:
    state = generator.bit_generator.state
    return lambda: setattr(generator.bit_generator, "state", state)


def _legacy(generator: np.random.RandomState) -> PutBack:
    state = generator.get_state()
    return lambda: generator.set_state(state)


def _random(generator: random.Random) -> PutBack:
    state = generator.getstate()
    return lambda: generator.setstate(state)
