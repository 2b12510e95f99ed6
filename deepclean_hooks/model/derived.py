"""Tensors that modules keep in plain attributes: derived weights, features of the last pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_ABSENT = object()


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Puts back, at the end, which tensors the model's modules keep outside parameters and
    buffers.

    What a pass leaves there is of that pass: a graph that was used up, or a constant without one,
    of which a later backward would know no parameter.
    """
    before = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            for name, value in list(vars(module).items()):
                was = attributes.get(name, _ABSENT)
                if value is not was and (_holds_tensors(value) or _holds_tensors(was)):
                    _restore(module, name, was)
            for name, inside in contents.items():
                held = attributes[name]
                if _differs(held, inside):
                    held.clear()
                    held.update(inside) if isinstance(held, dict) else held.extend(inside)


def _contents(module: nn.Module) -> dict[str, Any]:
    """What is in a module's own lists and dicts; not in torch's, of hooks and parameters."""
    return {
        name: value.copy()
        for name, value in vars(module).items()
        if type(value) in (dict, list) and name not in ("_parameters", "_buffers", "_modules")
    }


def _differs(held: Any, inside: Any) -> bool:
    """Whether tensors came into a list or dict, or went."""
    now = held.values() if isinstance(held, dict) else held
    then = inside.values() if isinstance(inside, dict) else inside
    tensors = [id(v) for v in now if isinstance(v, Tensor)]
    return tensors != [id(v) for v in then if isinstance(v, Tensor)]


def _holds_tensors(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(isinstance(item, Tensor) for item in value)
    if isinstance(value, dict):
        return any(isinstance(item, Tensor) for item in value.values())
    return isinstance(value, Tensor)


def _restore(module: nn.Module, name: str, was: object) -> None:
    if was is _ABSENT:
        delattr(module, name)
    else:
        vars(module)[name] = was
