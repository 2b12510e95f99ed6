"""The random state of the process, left as it was by what draws from it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

PutBack = Callable[[], object]


@contextmanager
def kept(*holders: object) -> Iterator[None]:
    """Puts back, at the end, what torch (on the CPU), numpy and random draw from.

    `holders` are objects such as samplers: the generators and the plain numbers among their
    attributes, such as the number of an epoch, are put back too.
    """
    back = [_torch(torch.default_generator), _numpy(), _python()]
    for holder in holders:
        back += _attributes(holder)
    try:
        yield
    finally:
        for put_back in back:
            put_back()


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
