"""Tensors as bits: what must not move is compared bit for bit, so that -0.0, subnormals and NaN
count too."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from deepclean_hooks.ranks.shards import whole

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The same memory read as signed integers of the same width: same shape and strides, writes go
    through."""
    return tensor.detach().view(_INTEGER[tensor.element_size()])


def require_comparable(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming them, for tensors whose entries no integer compares."""
    wide = [name for name, t in tensors.items() if t.element_size() not in _INTEGER]
    if wide:
        raise ValueError(
            f"{', '.join(wide[:5])}: {tensors[wide[0]].dtype} has "
            f"{tensors[wide[0]].element_size()} bytes an entry, which cannot be held bit for bit; "
            "keep it as real and imaginary parts, or as complex64"
        )


def differing(first: Tensor, second: Tensor) -> Tensor:
    """True where two tensors of the same shape and dtype differ in at least one bit."""
    return bits(first) != bits(second)


def as_bytes(tensor: Tensor) -> memoryview:
    """The entries of a tensor in row-major order as raw bytes, on the CPU."""
    flat = whole(tensor.detach()).to("cpu").contiguous().reshape(-1)
    array = flat.view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]  # arrays are buffers


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bits of a tensor: 64 hex digits.

    The name is no part of it: a tied tensor may be stored under another of its names.
    """
    sha = hashlib.sha256(f":{tensor.dtype}:{tuple(tensor.shape)};".encode())
    if tensor.numel():
        sha.update(as_bytes(tensor))
    return sha.hexdigest()


def combined(digests: Mapping[str, str]) -> str:
    """SHA-256 over names and the digests of their tensors, in the order of the names."""
    lines = "".join(f"{name}={digests[name]};" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bits of tensors: `combined` of their digests."""
    return combined({name: tensor_digest(tensors[name]) for name in sorted(tensors)})
