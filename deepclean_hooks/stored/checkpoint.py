"""What a checkpoint file holds, tensor by tensor, and its digests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.stored import bits

_WRAPPERS = ("module.", "_orig_mod.", "model.")
_INSIDE = ("model", "state_dict", "model_state_dict")


def digests(state: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each tensor of a state_dict, over dtype, shape and bits, by name."""
    return {name: bits.tensor_digest(value) for name, value in sorted(tensors(state).items())}


def digests_of(model: nn.Module) -> dict[str, str]:
    """The digests of what a checkpoint stores of a model; `bits.combined` of them is the model's.

    Of a sharded model the tensors are gathered one after the other; all ranks call this.
    """
    return digests(unwrap(model).state_dict())


def model_digest(model: nn.Module) -> str:
    """SHA-256 of what a checkpoint stores of a model, every bit, wrappers taken off."""
    return bits.combined(digests_of(model))


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a state_dict that are tensors."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def read(path: str | os.PathLike[str], names: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of what torch.save wrote of a state_dict, by the
    names that the model's own state_dict has (`names`).

    A state_dict under "model", "state_dict" or "model_state_dict" is found, and a prefix that a
    wrapper put before every name is taken off. Raises ValueError for another file; pickled objects
    other than tensors are never loaded.
    """
    where = Path(path)
    if not where.is_file():
        raise ValueError(f"{where} is no file")
    try:
        if where.suffix == ".safetensors":
            found: Any = load_file(where)
        else:
            found = torch.load(where, map_location="cpu", weights_only=True)
    except Exception as reason:  # neither library has an error of its own for a damaged file
        raise ValueError(f"{where} cannot be read as a checkpoint: {reason}") from reason
    for key in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    state = tensors(found) if isinstance(found, Mapping) else {}
    if not state:
        raise ValueError(f"{where} holds no state_dict: no tensor was found by name")
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not state.keys() & names.keys():
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
