"""Which samples of its data set a loader draws: the indices of its innermost sampler."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from deepclean_hooks.model import random_state

# timm repeats a sampler, or a batch sampler, for ever: its loader counts the batches.
_REPEATERS = ("_RepeatSampler",)

Index = Any  # an int, or what else the data set is indexed by: a key


def of_loader(loader: DataLoader[Any], name: str) -> tuple[Index, ...]:
    """The indices, each once, in order; what the sampler draws from is left as it was.

    Raises ValueError for a sampler that repeats samples, or draws different ones in each pass.
    """
    sampler, batched = _innermost(loader)
    dataset: Any = loader.dataset
    if _draws_everything(sampler):
        return tuple(range(len(sampler.data_source)))
    if hasattr(sampler, "num_replicas") and hasattr(sampler, "dataset"):
        if sampler.dataset is loader.dataset:
            # The ranks share the whole set; this sampler may pad it or show samples several times.
            return tuple(range(len(dataset)))
        # Lightning puts the user's sampler in as if it were the data set.
        sampler, batched = getattr(sampler.dataset, "_sampler", None), False
        if sampler is None:
            raise ValueError(
                f"the DistributedSampler of {name} is of another data set than the loader, so "
                "which samples it draws is not known; pass the Dataset (a Subset) itself"
            )
    if isinstance(sampler, SubsetRandomSampler):
        return _distinct([as_index(i) for i in sampler.indices], sampler, name)
    most = _most(loader.dataset)
    with random_state.kept(sampler, loader.sampler, loader.batch_sampler):
        first = _distinct(_drawn(sampler, batched, most), sampler, name)
        again = _distinct(_drawn(sampler, batched, most), sampler, name)
    if set(first) != set(again):
        raise ValueError(
            f"the sampler of {name} ({type(sampler).__name__}) draws different samples in each "
            f"pass: {len(first)} and then {len(again)}, {len(set(first) & set(again))} of them the "
            f"same, {_of(loader.dataset)}; pass the Dataset itself, or a Subset of the samples you "
            "mean"
        )
    return first


def as_index(value: Any) -> Index:
    """A number of any kind (numpy, a tensor of one entry) as an int; a key of another kind as it
    is."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        return value


def inside(subset: Subset[Any], positions: Iterable[Index]) -> list[Index]:
    """The indices into a Subset's data set that stand at these positions; from the end no more."""
    whole: Any = subset.dataset
    indices = [as_index(subset.indices[i]) for i in positions]
    if not hasattr(whole, "__len__"):
        return indices
    count = len(whole)
    return [i + count if isinstance(i, int) and -count <= i < 0 else i for i in indices]


def require_no_mask(dataset: Any, name: str) -> None:
    """Raises ValueError for a Subset whose indices are booleans, which it takes for 0 and 1."""
    while isinstance(dataset, Subset):
        first = next(iter(dataset.indices), None)
        if isinstance(first, bool | np.bool_) or getattr(first, "dtype", None) == torch.bool:
            raise ValueError(
                f"{name} is a Subset whose indices are a mask of booleans, which stand for the "
                "samples 0 and 1; pass their positions: "
                "Subset(dataset, [i for i, chosen in enumerate(mask) if chosen])"
            )
        dataset = dataset.dataset


def _innermost(loader: DataLoader[Any]) -> tuple[Any, bool]:
    """(The sampler inside all batch samplers, whether what it draws are batches of indices)."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    batched = True
    while True:
        if hasattr(sampler, "batch_sampler"):  # Accelerate's shards wrap the user's batch sampler
            sampler = sampler.batch_sampler
        elif hasattr(sampler, "sampler") and (batched or type(sampler).__name__ in _REPEATERS):
            batched = batched and hasattr(sampler.sampler, "batch_size")
            sampler = sampler.sampler
        else:
            return sampler, batched


def _draws_everything(sampler: Any) -> bool:
    if type(sampler) is SequentialSampler:
        return True
    return (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples >= len(sampler.data_source)
    )


def _drawn(sampler: Iterable[Any], batched: bool, most: int | None) -> list[Index]:
    """What one pass draws; stops when it has drawn much more than there is."""
    flat: Iterator[Any] = iter(sampler)
    if batched:
        flat = (index for batch in flat for index in _entries(batch))
    return [as_index(index) for index in itertools.islice(flat, most)]


def _entries(batch: Any) -> Iterable[Any]:
    return (batch,) if isinstance(batch, str | bytes) or not hasattr(batch, "__iter__") else batch


def _most(dataset: Any) -> int | None:
    """Enough draws to see that a sampler repeats samples."""
    return 10 * len(dataset) + 1000 if hasattr(dataset, "__len__") else None


def _distinct(drawn: list[Index], sampler: object, name: str) -> tuple[Index, ...]:
    for index in drawn:
        if not isinstance(index, Hashable) or isinstance(index, np.ndarray | Tensor):
            raise ValueError(
                f"the sampler of {name} ({type(sampler).__name__}) draws {type(index).__name__}, "
                "which names no single sample; draw integers or keys, or pass the Dataset itself"
            )
    distinct = set(drawn)
    if len(distinct) < len(drawn):
        raise ValueError(
            f"the sampler of {name} ({type(sampler).__name__}) repeats samples: {len(drawn)} "
            f"draws, {len(distinct)} distinct; pass the Dataset itself, a Subset of the samples "
            "you mean, or a loader that shows each sample once"
        )
    if all(isinstance(index, int) for index in distinct):
        return tuple(sorted(distinct))
    return tuple(sorted(distinct, key=lambda index: (type(index).__name__, repr(index))))


def _of(dataset: Any) -> str:
    return f"of {len(dataset)}" if hasattr(dataset, "__len__") else "of a data set without a length"
