"""Writes to frozen entries that no optimizer hook sees: noticed early, put back, and named.

An optimizer that is none of torch's, weights written by hand, a forward pass that writes its own
weights. Cost while there are none: an integer compared for each parameter in a backward pass, and
up to 8,192 entries of a single parameter read. Cost once there are: the held parameters are read
before every forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from deepclean_hooks.guard.held import Held, restore

_SAMPLE = 8192  # entries read of a parameter whose version did not change: a write through .data
_OFTEN = 64  # backward passes, after which a sample is read in every 64th only: on a GPU it waits


class UnseenWrites:
    """Watches the held parameters for writes outside the steps that are seen."""

    def __init__(self, model: nn.Module, held: dict[int, Held]) -> None:
        self.entries = 0  # frozen entries that had moved when the writes were noticed
        self.name = ""  # of the first parameter that was written
        self._model, self._held = model, held
        self._looks = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def look(self, held: Held) -> None:
        """Compares a parameter whose gradient has just been computed; notices it if it moved."""
        if self.entries:
            return
        self._looks += 1
        moved = 0
        if held.parameter._version != held.version:
            # Bits decide: SAM and averages that are swapped in for a test write and take back.
            # Ever more rarely, for on a GPU each look waits.
            held.version = held.parameter._version
            held.looks += 1
            if held.looks & (held.looks - 1) == 0:
                moved = held.changed()
        else:
            passes, place = divmod(self._looks, len(self._held) + 1)
            if place == 0 and (passes <= _OFTEN or passes % _OFTEN == 0):
                moved = held.changed(_SAMPLE)
        if moved:
            self._notice(held)

    def _notice(self, first: Held) -> None:
        self.entries = sum(held.changed() for held in self._held.values())
        self.name = first.name
        for module in self._model.modules():
            held = [
                self._held[id(parameter)]
                for parameter in module.parameters(recurse=False)
                if id(parameter) in self._held
            ]
            if held:
                before: Any = _PutBackBeforeForward(held)
                self._handles.append(module.register_forward_pre_hook(before))
        warnings.warn(self.remark(), stacklevel=2)

    def remark(self) -> str:
        """What happened, why and the way out; empty if nothing was noticed."""
        if not self.entries:
            return ""
        return (
            f"{self.entries} frozen entries (in {self.name} first) were written outside the "
            "optimizer steps that can be seen: by an optimizer that is none of torch's, by hand, "
            "or by a forward pass that writes its weights. They are put back before every forward "
            "pass and at the end; pass such an optimizer to guard() to have them put back after "
            "each of its steps"
        )

    def put_back(self) -> None:
        """Puts frozen entries back if writes were noticed before; else what moved has to show."""
        if self.entries:
            restore(self._held.values())

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _PutBackBeforeForward:
    """A forward pre-hook that puts the frozen entries of a module back where they moved.

    A copy of a hooked module (deepcopy, pickle) carries a copy of this object that holds nothing.
    """

    def __init__(self, held: Sequence[Held] = ()) -> None:
        self._held = held

    def __reduce__(self) -> tuple[type[_PutBackBeforeForward], tuple[()]]:
        return type(self), ()

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # not part of a graph; the end puts them back
        # Only where they moved: a checkpointed forward is computed again in the backward pass,
        # which refuses tensors that were written since.
        restore(_moved(self._held))


def _moved(held: Iterable[Held]) -> list[Held]:
    return [each for each in held if each.moved(each.parameter)]


def refuse_writing_forwards(model: nn.Module) -> None:
    """Raises ValueError for layers that rescale their weight in each forward pass, by name."""
    writing = [
        f"{name or type(module).__name__} (max_norm={module.max_norm})"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    if writing:
        raise ValueError(
            "these layers rescale rows of their weight in every forward pass, so no entry of them "
            f"can be held: {', '.join(writing)}; set their max_norm to None (rows that were looked "
            "up since the last step are within it already)"
        )
