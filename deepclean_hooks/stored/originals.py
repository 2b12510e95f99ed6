"""The old values of what a reset changed, kept in memory while a run goes on, to count what comes
back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepclean_hooks.ranks import shards
from deepclean_hooks.stored.bits import bits


class Originals:
    """Of each tensor the entries whose bits a reset changed, and these bits.

    Never stored: they are what is to be forgotten. One copy of the changed entries, and a bool an
    entry of the tensors that have some; of a sharded model of this rank's shards.
    """

    def __init__(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        self._changed: dict[str, Tensor] = {}
        self._old: dict[str, Tensor] = {}
        for name, tensor in before.items():
            old, new = bits(shards.local(tensor)), bits(shards.local(after[name]))
            changed = old != new
            if bool(changed.any()):
                self._changed[name], self._old[name] = changed, old[changed]

    def counts(self) -> dict[str, int]:
        """How many entries changed, by name."""
        return {name: old.numel() for name, old in self._old.items()}

    def back(self, now: Mapping[str, Tensor]) -> dict[str, int]:
        """How many of them hold their old bits again; none where a tensor has another form
        now, or is gone."""
        counts: dict[str, int] = {}
        for name, old in self._old.items():
            if name not in now:  # pruned, parametrized: the guard says so
                continue
            here = shards.local(now[name])
            changed = self._changed[name]
            if here.shape == changed.shape and bits(here).dtype == old.dtype:
                held = bits(here)[changed.to(here.device)] == old.to(here.device)
                counts[name] = int(torch.count_nonzero(held))
        return counts
