"""Masks stored as bits, and the fingerprint of what a mask leaves frozen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from deepclean_hooks.ranks.shards import cut, whole
from deepclean_hooks.stored.bits import bits, combined, tensor_digest


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


def frozen_digest(
    parameters: Mapping[str, Tensor], free: Mapping[str, Tensor], known: Mapping[str, str] | None
) -> str:
    """SHA-256 of all entries that may not move; the free ones are read as 0, whatever they hold.

    `known`: digests of the parameters as they are, which serve for those without a free entry. Of a
    sharded model one parameter is whole at a time; all ranks call this.
    """
    digests: dict[str, str] = {}
    for name, parameter in parameters.items():
        if name in free:
            frozen = bits(whole(parameter.detach())).masked_fill(whole(free[name]), 0)
            digests[name] = tensor_digest(frozen)
        else:
            digests[name] = (known or {}).get(name) or tensor_digest(parameter)
    return combined(digests)
