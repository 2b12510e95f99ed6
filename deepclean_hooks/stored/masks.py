"""Masks stored as bits, and the fingerprint of what a mask leaves frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from deepclean_hooks.ranks.shards import cut, whole
from deepclean_hooks.stored.bits import bits, digest


def pack(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One bit an entry: name -> uint8 (ceil(entries / 8),) on the CPU; 1.3 MiB for an 11M-entry
    ResNet-18. Of sharded masks the same, gathered one after the other; all ranks call this."""
    return {
        name: torch.from_numpy(np.packbits(whole(mask.detach()).cpu().reshape(-1).numpy()))
        for name, mask in masks.items()
    }


def unpack(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bool masks again, in the shapes and on the devices of `like`, and sharded as it is.

    Raises ValueError where they do not fit.
    """
    masks: dict[str, Tensor] = {}
    for name, stored in packed.items():
        if name not in like:
            raise ValueError(f"the stored mask names {name}, which this model does not have")
        tensor = like[name]
        if stored.numel() != -(-tensor.numel() // 8):
            raise ValueError(
                f"the stored mask of {name} has {stored.numel()} bytes, which does not fit its "
                f"shape {tuple(tensor.shape)}; load it into the model it was made for"
            )
        flat = np.unpackbits(stored.cpu().numpy(), count=tensor.numel()).astype(bool)
        full = torch.from_numpy(flat).view(tensor.shape).to(tensor.device)
        masks[name] = cut(full, tensor)
    return masks


def frozen_digest(parameters: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> str:
    """SHA-256 of all entries that may not move; the free ones are read as 0, whatever they hold."""

    return digest(_Frozen(parameters, free))


class _Frozen(Mapping[str, Tensor]):
    """Makes each tensor when it is asked for: of a sharded model only one is whole at a time."""

    def __init__(self, parameters: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> None:
        self._parameters, self._free = parameters, free

    def __getitem__(self, name: str) -> Tensor:
        integers = bits(whole(self._parameters[name].detach()))
        if name not in self._free:
            return integers
        return integers.masked_fill(whole(self._free[name]), 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
