"""A sample's identity: 64 bits of its content, taken before a collate function touches it.

Rows of a batch are no identity: padding to the longest of a batch gives a sample different bytes in
every batch. A sample of tensors and numbers has the fingerprint of its row in a batch by torch's
default collate function.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from deepclean_hooks.data import batches
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.layout import Layout, marked, of_collate
from deepclean_hooks.model import random_state
from deepclean_hooks.stored.bits import as_bytes

PLAIN = "each sample, which is collated as it is"
SAMPLES = "each sample before it is collated"
ROWS = "each row of a collated batch"  # of streams that make batches; and of earlier versions


def of_sample(sample: object) -> int:
    """The fingerprint of a sample as its data set gives it (BLAKE2b): equal for equal content.

    Text counts only in a sample without tensors, arrays, images or lists of numbers: the same
    image under two file names is the same sample.
    """
    parts = list(_parts(sample))
    bulky = any(kind == "bulk" for kind, _ in parts)
    digest = hashlib.blake2b(digest_size=8)
    for kind, data in parts:
        if kind != "text" or not bulky:
            digest.update(data)
    return int.from_bytes(digest.digest(), "little", signed=True)


class Identifying:
    """A collate function that also gives the fingerprints of the samples: (ids, batch).

    The ids are those of the batch's rows where the batch does not hold the samples one by one.
    `form` is the layout of its batches; `learns`: it is seen from the first batch of three samples.
    """

    def __init__(
        self,
        collate: Callable[[Any], Batch] | None,
        form: Layout | None = None,
        *,
        learns: bool = False,
    ) -> None:
        self.collate, self.form = collate or default_collate, form
        self.learns = learns and kind_of(collate) == SAMPLES

    def __call__(self, samples: Any) -> tuple[list[int], Batch]:
        """Fingerprints first: a collate function may change the samples."""
        ids = None
        if isinstance(samples, Sequence):
            # None stands for a sample that could not be read, which collate functions drop.
            ids = [of_sample(sample) for sample in samples if sample is not None]
            if self.learns and len(samples) > 2:
                with random_state.kept():
                    self.form, self.learns = of_collate(self.collate, list(samples[:3])), False
        batch = marked(self.collate(samples), self.form)
        with contextlib.suppress(TypeError):
            if ids is None or batches.size(batch) != len(ids):
                return batches.sample_ids(batch), batch
        return ids or [], batch


def kind_of(collate: Callable[[Any], Batch] | None) -> str:
    """What the fingerprints of a set with this collate function are of: PLAIN or SAMPLES."""
    return PLAIN if collate is None or collate is default_collate else SAMPLES


def comparable(first: str | None, second: str | None) -> bool:
    """Whether fingerprints of two kinds tell that a sample is the same; None is the kind that
    earlier versions knew, ROWS."""
    return {first or ROWS, second or ROWS} != {SAMPLES, ROWS}


def _parts(value: object) -> Iterator[tuple[str, bytes | memoryview]]:
    """(kind, bytes) of every leaf, in the order of the structure; the bytes are those that the
    default collate function makes of numbers."""
    if isinstance(value, Tensor):
        yield "bulk" if value.dim() else "number", as_bytes(value) if value.numel() else b""
    elif isinstance(value, np.ndarray):
        yield "bulk", value.tobytes()
    elif isinstance(value, np.generic):
        yield "number", value.tobytes()
    elif isinstance(value, bool):
        yield "number", struct.pack("<?", value)
    elif isinstance(value, int):
        width = 8 if -(2**63) <= value < 2**63 else value.bit_length() // 8 + 1
        yield "number", value.to_bytes(width, "little", signed=True)
    elif isinstance(value, float):
        yield "number", struct.pack("<d", value)
    elif isinstance(value, str):
        yield "text", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        yield "bulk", value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _parts(entry)
    elif isinstance(value, list | tuple):
        if value and all(isinstance(entry, int | float) for entry in value):
            yield "bulk", b""
        for entry in value:
            yield from _parts(entry)
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # an image of PIL
        yield "bulk", f"{value.mode}{getattr(value, 'size', '')}".encode()
        yield "bulk", value.tobytes()
    elif value is not None:
        # Objects of the user's classes, such as graphs: by their attributes if they have any.
        attributes = getattr(value, "__dict__", None)
        if attributes:
            yield from _parts(attributes)
        else:
            yield "bulk", pickle.dumps(value)
