"""The distinct samples behind a loader or a data set, whatever its order, padding or drop_last."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, fingerprints, indices, layout, loaders
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.fingerprints import Identifying
from deepclean_hooks.data.loaders import Opened
from deepclean_hooks.data.streams import Stream
from deepclean_hooks.model import random_state

Data = DataLoader[Any] | Dataset[Any]
DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True)
class Samples:
    """The distinct samples behind a loader or a data set, and how they become batches.

    `indices` is None where only walking tells which samples there are (an IterableDataset, a loader
    without batching, a wrapper that makes other batches): `stream` is then walked.
    """

    dataset: Any
    indices: tuple[indices.Index, ...] | None
    batch_size: int
    collate_fn: Callable[[list[Any]], Batch] | None
    loader: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[Batch], Batch] | None = None
    stream: Stream | None = None

    def batches(self) -> Iterator[Batch]:
        """This rank's batches: every sample once, in index order, the last batch as short as it
        comes."""
        for _, batch in self._walked(self.collate_fn):
            yield batch

    def identified(self) -> Iterator[tuple[list[int], Batch]]:
        """The same batches, each with the fingerprints of its samples."""
        yield from self._walked(Identifying(self.collate_fn, self.layout))

    def _walked(self, collate: Any) -> Iterator[tuple[list[int], Batch]]:
        if self.stream is not None:
            yield from self.stream.walk()
        if self.indices is None:
            return
        mine = [self.indices[i] for i in ranks.share(len(self.indices))]
        if not mine:
            return
        for read in DataLoader(
            Subset(self.dataset, mine),
            batch_size=self.batch_size,
            shuffle=False,
            collate_fn=collate,
            # A generator of its own: iterating a DataLoader draws a seed from the global one
            # otherwise.
            generator=torch.Generator(),
            **self.options,
        ):
            ids, batch = read if isinstance(collate, Identifying) else ([], read)
            batch = layout.marked(batch, self.layout)  # again: workers send tensors without it
            yield ids, batch if self.finish is None else self.finish(batch)

    @cached_property
    def layout(self) -> layout.Layout | None:
        """Which parts of a batch belong to single samples, where a collate function of the user's
        own makes it."""
        if self.indices is None or fingerprints.kind_of(self.collate_fn) == fingerprints.PLAIN:
            return None
        with random_state.kept():
            few = [self.dataset[i] for i in self.indices[:3]]
            return layout.of_collate(self.collate_fn or default_collate, few)

    @property
    def fingerprints(self) -> str:
        """What the fingerprints of its samples are of: PLAIN, SAMPLES or ROWS."""
        return fingerprints.kind_of(self.collate_fn) if self.stream is None else self.stream.kind

    def sample(self, position: int) -> Batch:
        """The batch of a single sample."""
        assert self.indices is not None  # a stream has no positions
        batch = (self.collate_fn or default_collate)([self.dataset[self.indices[position]]])
        batch = layout.marked(batch, self.layout)
        return batch if self.finish is None else self.finish(batch)

    def shuffled(self, seed: int) -> DataLoader[Any]:
        """A loader over the same samples in random order, drawn from a generator of its own, for
        training."""
        if self.indices is None:
            raise ValueError(
                "only samples with indices can be shuffled; pass a Dataset with a length"
            )
        collate = self.collate_fn
        return DataLoader(
            Subset(self.dataset, list(self.indices)),
            batch_size=self.batch_size,
            shuffle=True,
            # BatchNorm cannot train on a batch of one.
            drop_last=1 < self.batch_size < len(self.indices)
            and len(self.indices) % self.batch_size == 1,
            collate_fn=collate if self.finish is None else _Finished(collate, self.finish),
            generator=torch.Generator().manual_seed(seed),
            **self.options,
        )

    def __len__(self) -> int:
        """Batches of this rank; 0 where the number is not known beforehand."""
        if self.indices is not None:
            return -(-len(ranks.share(len(self.indices))) // self.batch_size)
        with contextlib.suppress(TypeError):  # a loader over a stream has a __len__ that raises
            return len(self.loader)
        return 0


class _Finished:
    """A collate function followed by what the user's wrapper does to a batch."""

    def __init__(self, collate: Any, finish: Callable[[Batch], Batch]) -> None:
        self.collate, self.finish = collate or default_collate, finish

    def __call__(self, samples: list[Any]) -> Batch:
        return self.finish(self.collate(samples))


def samples_of(
    data: Data | Samples,
    *,
    name: str = "data",
    batch_size: int | None = None,
    collate_fn: Any = None,
) -> Samples:
    """The distinct samples of a DataLoader, of its wrapper, or of a Dataset, whatever its order,
    shuffling or drop_last; Samples are returned as they are.

    Raises ValueError for an empty set and for a sampler that repeats samples or draws different
    ones in each pass, TypeError for anything else.
    """
    if isinstance(data, Samples):
        return data
    if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    _refuse_lookalikes(data, name)
    read = loaders.opened(data)
    if read is not None:
        inner: Any = read.loader.dataset
        _refuse_lookalikes(inner, name)
        indices.require_no_mask(inner, name)
        if not isinstance(inner, IterableDataset) and not hasattr(inner, "__getitem__"):
            raise TypeError(
                f"{name} is a DataLoader around a {type(inner).__name__}, which has no samples to "
                f"draw; pass the {type(inner).__name__} itself"
            )
        return _of_loader(read, name, batch_size, collate_fn)
    if isinstance(data, IterableDataset):
        return _of_stream(data, name, batch_size or DEFAULT_BATCH_SIZE, collate_fn)
    if isinstance(data, Mapping):
        raise TypeError(
            f"{name} is a mapping with the keys {sorted(map(str, data))[:5]}; pass the data set "
            f"under one of them, such as {name}=data[{next(iter(data), None)!r}]"
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        _require_some(len(data), name)
        indices.require_no_mask(data, name)
        _require_positions(data, name)
        size = batch_size or DEFAULT_BATCH_SIZE
        return Samples(data, tuple(range(len(data))), size, collate_fn)
    inside = " (its attribute dataset)" if hasattr(data, "dataset") else ""
    raise TypeError(
        f"{name} must be a DataLoader or a Dataset with a length, got {type(data).__name__}; pass "
        f"the Dataset that it reads from{inside}, with batch_size= and collate_fn= as it has them"
    )


def sets_of(given: Mapping[str, Data | None], **reading: Any) -> dict[str, Samples]:
    """The samples of each set that is given, by its name; `reading` is how `samples_of` reads them.

    Raises as `samples_of` and `refuse_shared_indices` do.
    """
    sets = {
        name: samples_of(data, name=name, **reading)
        for name, data in given.items()
        if data is not None
    }
    refuse_shared_indices(sets)
    return sets


def _of_loader(read: Opened, name: str, batch_size: int | None, collate: Any) -> Samples:
    loader = read.loader
    if isinstance(loader.dataset, IterableDataset):
        if loader.drop_last:
            raise ValueError(
                f"{name} is a loader over an IterableDataset with drop_last=True, which leaves "
                "samples out; use drop_last=False"
            )
        if read.as_is is None:
            return _of_stream(
                loader.dataset, name, loader.batch_size, collate or loader.collate_fn, read
            )
    if read.as_is is not None or loader.batch_sampler is None:
        return _as_it_is(read, name)
    drawn = indices.of_loader(loader, name)
    _require_some(len(drawn), name)
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
        drawn,
        int(size or DEFAULT_BATCH_SIZE),
        loaders.unmixed(collate or loader.collate_fn),
        loader,
        options,
        read.finish,
    )


def _of_stream(
    dataset: Any, name: str, batch_size: int | None, collate: Any, read: Opened | None = None
) -> Samples:
    """A stream is read in this process: workers that do not share it would each give all of it."""
    _require_one_rank(name)
    finish = None if read is None else read.finish
    collate = loaders.unmixed(collate)

    batched = None if batch_size is None else Identifying(collate, learns=True)

    def start() -> Iterator[tuple[list[int], Batch]]:
        plain: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=batched or collate,
            generator=torch.Generator(),
        )
        try:
            walk = iter(plain)
            first = next(walk, None)
        except Exception:
            if read is None or not read.loader.num_workers:
                raise
            # A stream that divides itself by torch.utils.data.get_worker_info() and nothing else.
            yield from ((batches.sample_ids(batch), batch) for batch in read.loader)
            return
        for each in walk if first is None else itertools.chain([first], walk):
            ids, batch = (batches.sample_ids(each), each) if batched is None else each
            yield ids, batch if finish is None else finish(batch)

    length = None
    with contextlib.suppress(TypeError):  # a chain of streams has a __len__ that raises
        length = len(dataset) if batched is not None and hasattr(dataset, "__len__") else None
    kind = fingerprints.ROWS if batched is None else fingerprints.kind_of(collate)
    stream = Stream(start, name, kind, length)
    loader = None if read is None else read.loader
    return Samples(dataset, None, batch_size or 1, collate, loader, finish=finish, stream=stream)


def _as_it_is(read: Opened, name: str) -> Samples:
    """A loader whose batches only it can make."""
    _require_one_rank(name)
    walked: Any = read.loader if read.as_is is None else read.as_is

    def start() -> Iterator[tuple[list[int], Batch]]:
        for batch in walked:
            yield batches.sample_ids(batch), batch

    length = None
    drawn = read.loader.batch_sampler or read.loader.sampler
    # Without batches of the loader's, an index may stand for a batch that the data set has made.
    if hasattr(drawn, "batch_size") and not isinstance(read.loader.dataset, IterableDataset):
        length = len(indices.of_loader(read.loader, name))
    stream = Stream(start, name, fingerprints.ROWS, length)
    return Samples(
        read.loader.dataset, None, read.loader.batch_size or 1, None, walked, stream=stream
    )


def _require_one_rank(name: str) -> None:
    if ranks.world()[1] > 1:
        raise ValueError(
            f"{name} is a loader whose samples have no indices, so {ranks.world()[1]} ranks "
            "cannot share them each once; use a Dataset with a length"
        )


def _require_some(count: int, name: str) -> None:
    if count == 0:
        raise ValueError(f"{name} is empty: it has 0 samples; check how the subset was made")


def _refuse_lookalikes(data: Any, name: str) -> None:
    """Raises TypeError for what has a length and entries, and is no data set."""
    if isinstance(data, str | bytes | os.PathLike):
        raise TypeError(
            f"{name} is the text or path {data!r}; pass the data set that it stands for, or, as "
            "retain=, a stored measurement: FisherDiagonal.load(path)"
        )
    tensors = isinstance(data, tuple | list) and all(isinstance(each, Tensor) for each in data)
    if tensors and len(data) == 2 and {each.dim() for each in data} != {0}:
        raise TypeError(
            f"{name} is a {type(data).__name__} of two tensors, not of samples; if they are the "
            f"inputs and their labels, pass TensorDataset(*{name})"
        )


def _require_positions(data: Any, name: str) -> None:
    with random_state.kept():
        try:
            data[0]
        except KeyError as reason:
            raise TypeError(
                f"{name} is a {type(data).__name__} that has no sample 0 (KeyError: {reason}), so "
                "it is indexed by keys; pass a DataLoader with a sampler of its keys"
            ) from reason


def origin(source: Samples) -> tuple[int, set[indices.Index]] | None:
    """(identity of the innermost data set, indices into it), or None where the samples have no
    indices."""
    if source.indices is None:
        return None
    dataset, inside = source.dataset, list(source.indices)
    while isinstance(dataset, Subset):
        inside = indices.inside(dataset, inside)
        dataset = dataset.dataset
    return id(dataset), set(inside)


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
            with random_state.kept():
                content = [fingerprints.of_sample(source.dataset[i]) for i in chosen]
    ranks.require_same_samples(name, source.indices, content)


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
