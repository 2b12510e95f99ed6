"""Activation checkpointing, switched off for a while: it runs the forward again in the backward,
where nobody sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.utils import checkpoint

from deepclean_hooks.model.switches import Switch

_FLAGS = ("grad_checkpointing", "gradient_checkpointing")


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Inside, nothing of the model is recomputed, and `torch.utils.checkpoint.checkpoint` calls its
    function.

    timm and transformers have a flag; torch's `checkpoint_wrapper`, which Accelerate applies under
    FSDP2, a function that calls the module.
    """
    changes: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        changes += [(module, flag, False) for flag in _FLAGS if getattr(module, flag, None) is True]
        if type(module).__name__ == "CheckpointWrapper" and hasattr(module, "checkpoint_fn"):
            changes.append((module, "checkpoint_fn", _called))
    with _functions_off(), _changed(changes):
        yield


@contextmanager
def _changed(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    were = [(place, name, getattr(place, name)) for place, name, _ in changes]
    try:
        for place, name, value in changes:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in were:
            setattr(place, name, value)


def _functions() -> AbstractContextManager[None]:
    # Models import `checkpoint` itself by name, so what it calls is replaced, with reentry and
    # without (whose name changed after torch 2.7).
    replaced = {
        "CheckpointFunction": _Called,
        "_checkpoint_without_reentrant_generator": _nothing_around,
        "_checkpoint_without_reentrant_generator_impl": _nothing_around,
    }
    there = [(checkpoint, n, value) for n, value in replaced.items() if hasattr(checkpoint, n)]
    return _changed(there)


_functions_off = Switch(_functions)


class _Called:
    """In place of the autograd function of checkpoints with reentry."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In place of what checkpoints without reentry do around their function."""
    yield


def _called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)
