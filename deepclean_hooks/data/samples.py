"""The distinct samples behind a loader or a data set, whatever its order, padding or drop_last."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data.distributed import DistributedSampler

from deepclean_hooks import ranks
from deepclean_hooks.data import batches
from deepclean_hooks.data.batches import Batch

Data = DataLoader[Any] | Dataset[Any]
DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True)
class Samples:
    """The distinct samples behind a loader or a data set, and how they become batches.

    `indices` is None where only the loader knows them (an IterableDataset, or a loader without
    batching); the loader is then walked as it is.
    """

    dataset: Any
    indices: tuple[int, ...] | None
    batch_size: int
    collate_fn: Callable[[list[Any]], Batch] | None
    loader: DataLoader[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def batches(self) -> Iterator[Batch]:
        """This rank's batches: every sample once, in index order, the last batch as short as it
        comes."""
        if self.indices is None:
            yield from self.loader if self.loader is not None else ()
            return
        mine = [self.indices[i] for i in ranks.share(len(self.indices))]
        if mine:
            yield from DataLoader(
                Subset(self.dataset, mine),
                batch_size=self.batch_size,
                shuffle=False,
                collate_fn=self.collate_fn,
                # A generator of its own: iterating a DataLoader draws a seed from the global one
                # otherwise.
                generator=torch.Generator(),
                **self.options,
            )

    def shuffled(self, seed: int) -> DataLoader[Any]:
        """A loader over the same samples in random order, drawn from a generator of its own, for
        training."""
        if self.indices is None:
            raise ValueError(
                "only samples with indices can be shuffled; pass a Dataset with a length"
            )
        return DataLoader(
            Subset(self.dataset, list(self.indices)),
            batch_size=self.batch_size,
            shuffle=True,
            # BatchNorm cannot train on a batch of one.
            drop_last=1 < self.batch_size < len(self.indices)
            and len(self.indices) % self.batch_size == 1,
            collate_fn=self.collate_fn,
            generator=torch.Generator().manual_seed(seed),
            **self.options,
        )

    def __len__(self) -> int:
        """Batches of this rank; 0 where the number is not known beforehand."""
        if self.indices is None:
            with contextlib.suppress(TypeError):
                return len(self.loader) if self.loader is not None else 0
            return 0
        return -(-len(ranks.share(len(self.indices))) // self.batch_size)


def samples_of(
    data: Data | Samples,
    *,
    name: str = "data",
    batch_size: int | None = None,
    collate_fn: Any = None,
) -> Samples:
    """The distinct samples of a DataLoader or a Dataset, whatever its order, shuffling or
    drop_last; Samples are returned as they are.

    Raises ValueError for an empty set and for a sampler that repeats samples, TypeError for
    anything else.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, DataLoader):
        return _of_loader(data, name, batch_size, collate_fn)
    if isinstance(data, IterableDataset):
        loader: DataLoader[Any] = DataLoader(
            data, batch_size=batch_size or DEFAULT_BATCH_SIZE, collate_fn=collate_fn
        )
        return _of_loader(loader, name, None, None)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        _require_some(len(data), name)
        size = batch_size or DEFAULT_BATCH_SIZE
        return Samples(data, tuple(range(len(data))), size, collate_fn)
    raise TypeError(
        f"{name} must be a DataLoader or a Dataset with a length, got {type(data).__name__}; wrap "
        "it in a torch.utils.data.DataLoader"
    )


def _of_loader(loader: DataLoader[Any], name: str, batch_size: int | None, collate: Any) -> Samples:
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        if loader.drop_last:
            raise ValueError(
                f"{name} is a loader over an IterableDataset with drop_last=True, which leaves "
                "samples out; use drop_last=False"
            )
        if ranks.world()[1] > 1:
            raise ValueError(
                f"{name} is a loader whose samples have no indices, so {ranks.world()[1]} ranks "
                "cannot share them each once; use a Dataset with a length"
            )
        return Samples(loader.dataset, None, loader.batch_size or 1, None, loader)
    indices = tuple(_indices(loader, name))
    _require_some(len(indices), name)
    options: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory and torch.cuda.is_available(),
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
    }
    if loader.num_workers:
        options["prefetch_factor"] = loader.prefetch_factor
    size = batch_size or loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return Samples(
        loader.dataset,
        indices,
        int(size or DEFAULT_BATCH_SIZE),
        collate or loader.collate_fn,
        loader,
        options,
    )


def _require_some(count: int, name: str) -> None:
    if count == 0:
        raise ValueError(f"{name} is empty: it has 0 samples; check how the subset was made")


def _indices(loader: DataLoader[Any], name: str) -> Iterator[int]:
    """The indices a loader draws from, each once: those of its innermost sampler."""
    sampler: Any = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):  # Accelerate's shards wrap the user's batch sampler
        sampler = sampler.batch_sampler
    sampler = getattr(sampler, "sampler", sampler)
    if type(sampler) is SequentialSampler or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and _draws_all(sampler)
    ):
        yield from range(len(sampler.data_source))
        return
    if isinstance(sampler, DistributedSampler):
        if sampler.dataset is loader.dataset:
            yield from range(len(sampler.dataset))  # type: ignore[arg-type]  # it has a length
            return
        # Lightning puts the user's own sampler in as if it were the data set.
        sampler = getattr(sampler.dataset, "_sampler", None)
        if sampler is None:
            raise ValueError(
                f"the DistributedSampler of {name} is of another data set than the loader, so "
                "which samples it draws is not known; pass the Dataset (a Subset) itself"
            )
    drawn = sampler.indices if hasattr(sampler, "indices") else _flatten(sampler)
    indices = [int(i) for i in drawn]
    if len(set(indices)) < len(indices):
        raise ValueError(
            f"the sampler of {name} ({type(sampler).__name__}) repeats samples: {len(indices)} "
            f"draws, {len(set(indices))} distinct; pass a Dataset, or a loader that shows each "
            "sample once"
        )
    yield from sorted(indices)


def _draws_all(sampler: RandomSampler) -> bool:
    return sampler.num_samples == len(sampler.data_source)


def _flatten(sampler: Sampler[Any]) -> Iterator[int]:
    for drawn in sampler:
        if isinstance(drawn, int | Tensor):
            yield int(drawn)
        else:
            yield from (int(i) for i in drawn)


def origin(source: Samples) -> tuple[int, set[int]] | None:
    """(identity of the innermost data set, indices into it), or None where the samples have no
    indices."""
    if source.indices is None:
        return None
    dataset, indices = source.dataset, list(source.indices)
    while isinstance(dataset, Subset):
        indices = [int(dataset.indices[i]) for i in indices]
        dataset = dataset.dataset
    return id(dataset), set(indices)


def changes_from_pass_to_pass(source: Samples, probes: int = 4) -> bool:
    """Whether reading a sample twice gives two different samples: an augmenting transform."""
    if source.indices is None:
        return False
    collate = source.collate_fn or torch.utils.data.default_collate
    chosen = [source.dataset[i] for i in source.indices[:probes]]
    again = [source.dataset[i] for i in source.indices[:probes]]
    return batches.sample_ids(collate(chosen)) != batches.sample_ids(collate(again))


def require_same_on_ranks(source: Samples, name: str, changing: bool, probes: int = 4) -> None:
    """Raises RuntimeError on every rank if the ranks were given different samples; reads a few.

    A split drawn on each rank without a seed is the usual reason. Samples that are `changing` are
    told apart by their indices only.
    """
    if ranks.world()[1] == 1 or source.indices is None:
        return
    content: list[int] = []
    with ranks.fail_together():
        if not changing:
            chosen = source.indices[:: max(1, len(source.indices) // probes)][:probes]
            collate = source.collate_fn or torch.utils.data.default_collate
            content = batches.sample_ids(collate([source.dataset[i] for i in chosen]))
    ranks.require_same_samples(name, source.indices, content)


def warn_if_changing(source: Samples, name: str) -> bool:
    """Warns, once a set, that its samples change from pass to pass; returns whether they do."""
    changing = changes_from_pass_to_pass(source)
    if changing:
        warnings.warn(
            f"the samples of {name} change from pass to pass (a random transform): the measurement "
            "is of the "
            "augmented samples of one pass, and another pass gives another one; use the "
            "test-time transform",
            UserWarning,
            stacklevel=3,
        )
    return changing


def refuse_shared_indices(sets: Mapping[str, Samples]) -> None:
    """Raises ValueError if `forget` and `retain` draw the same indices from one data set."""
    if "forget" not in sets or "retain" not in sets:
        return
    forget, retain = origin(sets["forget"]), origin(sets["retain"])
    if forget is None or retain is None or forget[0] != retain[0]:
        return
    shared = sorted(forget[1] & retain[1])
    if shared:
        raise ValueError(
            f"{len(shared)} samples stand in both the forget and the retain set, for instance the "
            f"indices {shared[:3]}; leave the forget samples out of the retain set"
        )
