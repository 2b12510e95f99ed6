"""Following a method of one object: something more happens around each call, until undone."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Around = Callable[..., AbstractContextManager[None] | None]


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive; returns None once that is gone."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*args, **kwargs)

    return call


def follow(owner: Any, name: str, around: Around) -> Callable[[], None]:
    """Runs every call of a method inside `around(owner, name, *args, **kwargs)`, the arguments of
    the call; returns what undoes that."""
    original, before = getattr(owner, name), vars(owner).get(name)

    @functools.wraps(original)
    def followed(this: Any, *args: Any, **kwargs: Any) -> Any:
        with around(this, name, *args, **kwargs) or contextlib.nullcontext():
            return original(*args, **kwargs)

    # A bound method, because learning rate schedulers wrap `optimizer.step.__func__`.
    method = types.MethodType(followed, owner)
    setattr(owner, name, method)
    return functools.partial(_put_back, owner, name, method, before)


def _put_back(owner: Any, name: str, method: object, before: object | None) -> None:
    # Wrapped again since (by a scheduler made later): that wrapper stays and goes on calling
    # `followed`, whose `around` finds nothing left to do.
    if vars(owner).get(name) is not method:
        return
    if before is None:
        delattr(owner, name)
    else:
        setattr(owner, name, before)
