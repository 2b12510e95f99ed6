"""What is set for the whole process while models are measured, in whichever threads."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

from torch import nn


class Switch:
    """A setting of the process that several threads may need changed at a time.

    The first thread changes it and the last puts it back: alone, a thread would take the
    change of another for the state to go back to.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change, self._lock, self._users = change, threading.Lock(), 0
        self._held = ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The setting is changed inside the block."""
        with self._lock:
            if not self._users:
                self._held.enter_context(self._change())
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._held.close()


_MODELS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_MODELS_LOCK = threading.Lock()


def alone(model: nn.Module) -> threading.RLock:
    """The lock of a model: its modes and buffers are changed by one thread at a time."""
    with _MODELS_LOCK:
        return _MODELS.setdefault(model, threading.RLock())
