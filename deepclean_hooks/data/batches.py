"""A batch of any form - `(x, y)`, a mapping, nested - taken apart by sample.

N: the number of samples. A tensor of a batch holds samples if its first dimension has N entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deepclean_hooks.stored.bits import as_bytes

Batch = Any  # what the user's loader yields


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same batch with every tensor replaced; mappings come back as dict, everything else as it
    was."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def tensors(batch: Batch) -> Iterator[Tensor]:
    """Every tensor of the batch, in the order of its structure."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors(value)


def size(batch: Batch) -> int:
    """N, the number of samples: the length of the labels if the batch has them, of its first tensor
    otherwise."""
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        candidates = [batch["labels"]]
    elif isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        candidates = [batch[1]]
    else:
        candidates = list(tensors(batch))
    for tensor in candidates:
        if tensor.dim():
            return int(tensor.shape[0])
    raise TypeError(
        f"cannot tell how many samples a batch of type {type(batch).__name__} holds: it has no "
        "tensor with a first dimension; yield (x, y) or a mapping with 'labels' from the loader "
        "(or its collate_fn)"
    )


def rows(batch: Batch, index: Tensor) -> Batch:
    """The samples at `index` (a 1-D tensor of positions, repeats allowed) as a batch of the same
    form."""
    count = size(batch)

    def pick(tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[0] == count:
            return tensor.index_select(0, index.to(tensor.device))
        return tensor

    return map_tensors(batch, pick)


def split(batch: Batch, most: int) -> Iterator[Batch]:
    """The batch in pieces of at most `most` samples."""
    count = size(batch)
    if count <= most:
        yield batch
        return
    for start in range(0, count, most):
        yield rows(batch, torch.arange(start, min(start + most, count)))


def to(batch: Batch, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """The batch on `device`, floating-point tensors in `dtype` if one is given."""
    # Only towards an accelerator, which works in order: the CPU would read what has not arrived.
    apart = device.type != "cpu"

    def move(tensor: Tensor) -> Tensor:
        if dtype is not None and tensor.is_floating_point():
            return tensor.to(device, dtype, non_blocking=apart)
        return tensor.to(device, non_blocking=apart)

    return map_tensors(batch, move)


def sample_ids(batch: Batch) -> list[int]:
    """One 64-bit fingerprint per sample, from the bits of its rows: equal exactly for equal content
    (BLAKE2b)."""
    count = size(batch)
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(count)]
    for tensor in tensors(batch):
        if tensor.dim() and tensor.shape[0] == count and tensor.numel():
            data = as_bytes(tensor)
            step = len(data) // count
            for i, one in enumerate(hashes):
                one.update(data[i * step : (i + 1) * step])
    return [int.from_bytes(one.digest(), "little", signed=True) for one in hashes]
