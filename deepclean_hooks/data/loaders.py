"""What wraps a DataLoader, and what it does to the batches: timm's prefetcher, Fabric, Accelerate.

Samples are read from the data set itself, so a wrapper has to be understood: a wrapper that only
moves batches is taken off, timm's normalisation is applied, any other wrapper is walked as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from deepclean_hooks.data import batches
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.model import random_state

_ATTRIBUTES = ("loader", "dataloader", "_dataloader", "base_dataloader", "_loader", "data_loader")
# Their batches are those of the plain DataLoader, elsewhere or in shares.
_MOVERS = ("_FabricDataLoader", "MpDeviceLoaderWrapper")
_PLAIN = ("torch.", "timm.", "accelerate.", "torchdata.", "torch_geometric.")


@dataclass(frozen=True)
class Opened:
    """A DataLoader and what its wrapper does to its batches; `as_is`: the user's object, where
    that is not known, so that the object itself is walked."""

    loader: DataLoader[Any]
    finish: Callable[[Batch], Batch] | None = None
    as_is: Iterable[Batch] | None = None


def opened(data: object) -> Opened | None:
    """The DataLoader that this is or wraps; None for anything else."""
    wrapper, inner = data, data
    while not isinstance(inner, DataLoader):
        inside = (getattr(inner, name, None) for name in _ATTRIBUTES)
        inner = next((each for each in inside if hasattr(each, "__iter__")), None)
        if inner is None:
            return None
    if isinstance(wrapper, DataLoader):
        return Opened(wrapper, as_is=wrapper if _makes_its_own(wrapper) else None)
    if type(wrapper).__name__ == "PrefetchLoader" and hasattr(wrapper, "mean"):
        return Opened(inner, finish=Normalised(wrapper))
    if type(wrapper).__name__ in _MOVERS or _same_first_batch(wrapper, inner):
        return Opened(inner)
    return Opened(inner, as_is=wrapper)  # type: ignore[arg-type]  # it has an __iter__


class Normalised:
    """What timm's PrefetchLoader makes of a batch, in float32 and without its random erasing."""

    def __init__(self, prefetcher: Any) -> None:
        self.mean, self.std = prefetcher.mean.float().cpu(), prefetcher.std.float().cpu()

    def __call__(self, batch: Batch) -> Batch:
        """Pixels of 0 to 255 become (pixel - mean) / std; the labels stay."""
        images, labels = batch
        return images.float().sub(self.mean).div(self.std), labels


def unmixed(collate: Any) -> Any:
    """The collate function, or timm's plain function where it mixes samples with each other."""
    if type(collate).__name__ != "FastCollateMixup":
        return collate
    return sys.modules["timm.data.loader"].fast_collate


def _makes_its_own(loader: DataLoader[Any]) -> bool:
    """Whether a subclass of DataLoader gives batches that a plain DataLoader would not."""
    changed = type(loader).__iter__ is not DataLoader.__iter__
    if not changed or type(loader).__module__.startswith(_PLAIN):
        return False
    return not _same_first_batch(loader, _Plain(loader))


class _Plain:
    """A loader of a subclass, iterated as the plain DataLoader that it is underneath."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return DataLoader.__iter__(self.loader)


def _same_first_batch(wrapper: Any, inner: Any) -> bool:
    """Whether the two begin with the same bits, drawn from the same random state."""
    loader: Any = getattr(inner, "loader", inner) if isinstance(inner, _Plain) else inner
    drawn_from = (loader, loader.sampler, loader.batch_sampler, loader.dataset)
    firsts = []
    for each in (wrapper, inner):
        with random_state.kept(*drawn_from):
            firsts.append(next(iter(each), None))
    return _bits(firsts[0]) == _bits(firsts[1])


def _bits(batch: Batch) -> object:
    if batch is None:
        return None
    forms = [(t.dtype, tuple(t.shape)) for t in batches.tensors(batch)]
    try:
        return forms, batches.sample_ids(batches.map_tensors(batch, Tensor.cpu))
    except TypeError:
        return forms
