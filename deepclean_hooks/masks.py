"""Masks stored as bits, and the fingerprint of what a mask leaves frozen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from deepclean_hooks.bits import bits, digest
from deepclean_hooks.shards import whole


def pack(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One bit an entry: name -> uint8 (ceil(entries / 8),) on the CPU; 1.3 MiB for an 11M-entry
    ResNet-18."""
    return {
        name: torch.from_numpy(np.packbits(mask.detach().cpu().reshape(-1).numpy()))
        for name, mask in masks.items()
    }


def unpack(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bool masks again, in the shapes and on the devices of `like`; raises ValueError where
    they do not fit."""
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
        masks[name] = torch.from_numpy(flat).view(tensor.shape).to(tensor.device)
    return masks


def frozen_digest(parameters: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> str:
    """SHA-256 of all entries that may not move; the free ones are read as 0, whatever they hold."""

    def frozen(name: str, parameter: Tensor) -> Tensor:
        integers = bits(whole(parameter.detach()))
        return integers.masked_fill(free[name], 0) if name in free else integers

    return digest({name: frozen(name, p) for name, p in parameters.items()})
