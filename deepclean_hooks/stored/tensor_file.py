"""A safetensors file with a digest of its content, written and read one tensor after the other.

The library's own writer wants all tensors at once, which is what no rank of a sharded model has
room for, and knows no digest: a flipped bit is read as another number.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepclean_hooks import ranks
from deepclean_hooks.ranks import shards
from deepclean_hooks.stored import bits
from deepclean_hooks.stored.files import written_whole

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_DIGEST = "digest"


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes the file, whole or not at all, with a SHA-256 of names, tensors and metadata.

    Sharded tensors are gathered one after the other and written by rank 0: all ranks call this, an
    error in writing is raised on all of them, and none returns before the file is there.
    """
    # The names of one dtype together, the widest first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    gathered = (shards.whole(tensors[name]) for name in order)
    if not any(map(shards.is_shard, tensors.values())):
        _write(gathered, tensors, order, path, metadata)
        return
    failure: Exception | None = None
    if ranks.is_first():
        try:
            _write(gathered, tensors, order, path, metadata)
        except OSError as reason:
            failure = reason
    for _ in gathered:
        pass  # the other ranks' part; rank 0's too, where it could not write
    with ranks.fail_together():
        if failure is not None:
            raise failure


def _write(
    whole: Iterator[Tensor],
    tensors: Mapping[str, Tensor],
    order: list[str],
    path: Path,
    metadata: Mapping[str, str],
) -> None:
    with written_whole(path) as temporary, Path(temporary).open("wb") as file:
        unknown = {**metadata, _DIGEST: "0" * 64}  # as long as the digest that takes its place
        file.write(_header(tensors, order, unknown))
        digests = {}
        for name, tensor in zip(order, whole, strict=True):
            file.write(bits.as_bytes(tensor))
            digests[name] = bits.digest({"": tensor})
        file.seek(0)
        file.write(_header(tensors, order, {**metadata, _DIGEST: _digest(digests, metadata)}))


def read(
    path: str | os.PathLike[str],
    device: str = "cpu",
    keep: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """The tensors, the metadata, and whether a digest vouches for both; a file that `write` did not
    write has none.

    `keep(name, tensor)` is what is kept of each tensor. Raises ValueError for a file that is
    damaged or no safetensors file.
    """
    where = os.fspath(path)
    tensors, digests = {}, {}
    with _named(where), safe_open(where, framework="pt", device="cpu") as file:
        metadata = dict(file.metadata() or {})
        for name in file.keys():  # noqa: SIM118  # safe_open is no mapping to iterate over
            whole = file.get_tensor(name)
            digests[name] = bits.digest({"": whole})
            tensors[name] = keep(name, whole.to(device))
    written = metadata.pop(_DIGEST, None)
    if written is not None and written != _digest(digests, metadata):
        raise ValueError(
            f"{where} is damaged: its content does not fit the digest that it was written with; "
            "restore it from a backup, or measure again and save"
        )
    return tensors, metadata, written is not None


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors of the library become a ValueError with the path; a missing file stays a
    FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as reason:
        raise ValueError(
            f"{path} is damaged or no safetensors file, so it cannot be read: {reason}"
        ) from reason


def _digest(tensors: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    text = json.dumps([dict(tensors), dict(metadata)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
