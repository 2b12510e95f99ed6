"""A safetensors file of sharded tensors, written one tensor after the other.

The library's own writer wants all tensors at once, which is what no rank has room for.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deepclean_hooks import ranks
from deepclean_hooks.ranks import shards
from deepclean_hooks.stored.bits import as_bytes
from deepclean_hooks.stored.files import written_whole

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64"}


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Rank 0 writes the file, whole or not at all; all ranks call this and gather each tensor.

    An error in writing is raised on all ranks, and none returns before the file is there.
    """
    # The names of one dtype together, the widest first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    gathered = (shards.whole(tensors[name]) for name in order)
    failure: Exception | None = None
    if ranks.is_first():
        try:
            with written_whole(path) as temporary, Path(temporary).open("wb") as file:
                file.write(_header(tensors, order, metadata))
                for tensor in gathered:
                    file.write(as_bytes(tensor))
        except OSError as reason:
            failure = reason
    for _ in gathered:
        pass  # the other ranks' part; rank 0's too, where it could not write
    with ranks.fail_together():
        if failure is not None:
            raise failure


def _header(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + math.prod(tensor.shape) * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
