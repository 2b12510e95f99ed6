"""Which parts of a batch belong to single samples: seen from how it grows with their number.

A first dimension that equals the number of samples by chance (class weights that travel with the
batch, the three channels of an image in a list) cannot be told from a batch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from deepclean_hooks.data.batches import Batch, SampleList, shared

Layout = Any  # the batch's structure with "rows", "shared" or "list" in place of what it holds


def of_collate(collate: Callable[[list[Any]], Batch], samples: list[Any]) -> Layout | None:
    """The layout of what a collate function makes of these samples; None where two and three of
    them do not tell."""
    if len(samples) < 3:
        return None
    try:
        return _compare(collate(samples[:2]), collate(samples[:3]))
    except Exception:  # a collate function may need more samples than three
        return None


def marked(batch: Batch, layout: Layout | None) -> Batch:
    """The batch with its parts marked for `batches.rows`; as it is where it has another form."""
    if layout == "list" and isinstance(batch, list | tuple):
        return SampleList(batch)
    if layout == "shared" and isinstance(batch, Tensor):
        return shared(batch)
    if isinstance(layout, dict) and isinstance(batch, Mapping) and layout.keys() == batch.keys():
        return {key: marked(value, layout[key]) for key, value in batch.items()}
    if isinstance(layout, list) and isinstance(batch, list | tuple) and len(layout) == len(batch):
        parts = [marked(value, at) for value, at in zip(batch, layout, strict=True)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _compare(two: Batch, three: Batch) -> Layout:
    """The layout from batches of two and of three samples."""
    if isinstance(two, Tensor) and isinstance(three, Tensor):
        lengths = two.shape[:1], three.shape[:1]
        if lengths[0] == lengths[1]:
            return "shared"
        return "rows" if lengths == ((2,), (3,)) else None
    if isinstance(two, Mapping) and isinstance(three, Mapping) and two.keys() == three.keys():
        return {key: _compare(two[key], three[key]) for key in two}
    if isinstance(two, list | tuple) and isinstance(three, list | tuple):
        if (len(two), len(three)) == (2, 3):
            return "list"
        if len(two) == len(three):
            return [_compare(a, b) for a, b in zip(two, three, strict=True)]
    return None
