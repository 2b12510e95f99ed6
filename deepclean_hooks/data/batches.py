"""A batch of any form - `(x, y)`, a mapping, nested - taken apart by sample.

N: the number of samples. A tensor of a batch holds samples if its first dimension has N entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepclean_hooks.stored.bits import as_bytes

Batch = Any  # what the user's loader yields

_T = TypeVar("_T")
LABEL_NAMES = ("labels", "label", "targets", "target", "y")
_NO_LABELS = ("idx", "index", "indices", "id", "ids", "length", "lengths")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class SampleList(list[_T]):
    """A list with one entry for each sample of its batch, such as images of different sizes."""


def shared(tensor: Tensor) -> Tensor:
    """An alias of a tensor that belongs to no single sample, whatever its first dimension: class
    weights that travel with the batch."""
    alias = tensor.detach()
    alias._is_shared = True  # type: ignore[attr-defined]  # on our alias, not on the user's tensor
    return alias


def is_shared(tensor: Tensor) -> bool:
    """Whether `shared` made it, or `map_tensors` from such a tensor."""
    return getattr(tensor, "_is_shared", False)


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same batch with every tensor replaced; mappings come back as dict, everything else as it
    was."""
    if isinstance(batch, Tensor):
        changed = change(batch)
        return shared(changed) if is_shared(batch) else changed
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def tensors(batch: Batch) -> list[Tensor]:
    """Every tensor of the batch, in the order of its structure."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return [tensor for value in batch for tensor in tensors(value)]
    return []


def label_key(batch: Mapping[Any, Any]) -> Any:
    """The key of a mapping's class indices; None where no key, or more than one, could be it."""
    if "labels" in batch:
        return "labels"
    candidates = [
        key
        for key, value in batch.items()
        if isinstance(value, Tensor)
        and value.dim() == 1
        and value.dtype in INTEGERS
        and key not in _NO_LABELS
    ]
    if len(candidates) > 1:
        candidates = [key for key in candidates if key in LABEL_NAMES]
    return candidates[0] if len(candidates) == 1 else None


def labels_of(batch: Batch) -> Any:
    """The labels of a batch `(x, y)` or of a mapping with class indices; None for other batches."""
    if isinstance(batch, Mapping):
        return batch.get(label_key(batch))
    return batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None


def size(batch: Batch) -> int:
    """N, the number of samples: the length of the labels if the batch has them, of a list of
    samples or of its first tensor otherwise."""
    labels = labels_of(batch)
    if isinstance(labels, Tensor) and labels.dim():
        return int(labels.shape[0])
    for held in _samples_in(batch):
        return len(held)
    for tensor in tensors(batch):
        if tensor.dim() and not is_shared(tensor):
            return int(tensor.shape[0])
    raise TypeError(
        f"cannot tell how many samples a batch of type {type(batch).__name__} holds: it has no "
        "tensor with a first dimension; yield (x, y) or a mapping with 'labels' from the loader "
        "(or its collate_fn)"
    )


def _samples_in(batch: Batch) -> Iterator[SampleList[Any]]:
    if isinstance(batch, SampleList):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _samples_in(value)


def rows(batch: Batch, index: Tensor) -> Batch:
    """The samples at `index` (a 1-D tensor of positions, repeats allowed) as a batch of the same
    form."""

    def pick(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, index.to(tensor.device))

    return _map_samples(batch, size(batch), pick, lambda held: [held[i] for i in index.tolist()])


def change_sample(batch: Batch, at: int, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor of the sample at position `at` replaced; the tensors
    of other samples are copies."""

    def row(tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        copy[at] = change(copy[at])
        return copy

    def entry(held: Sequence[Any]) -> list[Any]:
        return [map_tensors(each, change) if i == at else each for i, each in enumerate(held)]

    return _map_samples(batch, size(batch), row, entry)


def _map_samples(
    batch: Batch,
    count: int,
    on_rows: Callable[[Tensor], Tensor],
    on_list: Callable[[Sequence[Any]], list[Any]],
    outermost: bool = True,
) -> Batch:
    """The batch with what belongs to single samples replaced: tensors of `count` rows, and lists of
    `count` samples."""
    if isinstance(batch, Tensor):
        of_rows = batch.dim() and batch.shape[0] == count and not is_shared(batch)
        return on_rows(batch) if of_rows else batch
    deeper = (count, on_rows, on_list, False)
    if isinstance(batch, Mapping):
        return {key: _map_samples(value, *deeper) for key, value in batch.items()}
    if not isinstance(batch, list | tuple):
        return batch
    if len(batch) == count and (
        isinstance(batch, SampleList) or (not outermost and _of_samples(batch, count))
    ):
        return type(batch)(on_list(batch))
    parts = [_map_samples(value, *deeper) for value in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _of_samples(values: list[Any] | tuple[Any, ...], count: int) -> bool:
    """Whether a list of N entries has an entry for each sample: tensors that are not of N rows
    themselves, or no tensors at all."""
    if hasattr(values, "_fields"):
        return False
    held = [value for value in values if isinstance(value, Tensor)]
    if held:
        batched = all(tensor.dim() and tensor.shape[0] == count for tensor in held)
        return len(held) == len(values) and not batched
    return not any(isinstance(value, Mapping | list | tuple) for value in values)


def split(batch: Batch, most: int) -> Iterator[Batch]:
    """The batch in pieces of at most `most` samples."""
    count = size(batch)
    if count <= most:
        yield batch
        return
    for start in range(0, count, most):
        yield rows(batch, torch.arange(start, min(start + most, count)))


def to(batch: Batch, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """The batch on `device`, floating-point tensors in `dtype` if it is given."""
    # Only towards an accelerator, which works in order: the CPU would read what has not arrived.
    apart = device.type != "cpu"

    def move(tensor: Tensor) -> Tensor:
        if dtype is not None and tensor.is_floating_point():
            return tensor.to(device, dtype, non_blocking=apart)
        return tensor.to(device, non_blocking=apart)

    return map_tensors(batch, move)


def sample_ids(batch: Batch) -> list[int]:
    """A 64-bit fingerprint of each sample, from the bits of its rows: equal exactly for equal
    content (BLAKE2b)."""
    count = size(batch)
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(count)]

    def of_rows(tensor: Tensor) -> Tensor:
        data = as_bytes(tensor) if tensor.numel() else b""
        step = len(data) // count
        for i, sample in enumerate(hashes):
            sample.update(data[i * step : (i + 1) * step])
        return tensor

    def of_list(held: Sequence[Any]) -> list[Any]:
        for value, sample in zip(held, hashes, strict=True):
            for tensor in tensors(value):
                sample.update(as_bytes(tensor) if tensor.numel() else b"")
        return list(held)

    _map_samples(batch, count, of_rows, of_list)
    return [int.from_bytes(sample.digest(), "little", signed=True) for sample in hashes]
