"""Which samples stand behind a loader: each once, known for certain, or refused by name."""

import itertools
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from deepclean_hooks import SSD, FisherDiagonal, Session, fisher_diagonal
from deepclean_hooks.data.changing import changes_from_pass_to_pass
from deepclean_hooks.data.samples import samples_of

COUNT = 50


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(COUNT, 12, generator=generator), torch.arange(COUNT) % 4)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(12, 4).double()


class Doubles(Dataset):
    """The samples in float64, by index or by key."""

    def __init__(self, keys: list[object] | None = None) -> None:
        self.keys = keys

    def __getitem__(self, key: object) -> tuple[Tensor, int]:
        x, y = data()[key if self.keys is None else self.keys.index(key)]
        return x.double(), int(y)

    def __len__(self) -> int:
        return COUNT


def measured(loader: object) -> FisherDiagonal:
    return fisher_diagonal(linear(), loader, progress=False)


def same(one: FisherDiagonal, other: FisherDiagonal) -> bool:
    close = all(torch.allclose(one.sums[n], t, rtol=1e-12) for n, t in other.sums.items())
    return one.count == other.count and torch.equal(one.samples, other.samples) and close


class Drawn(Sampler):
    """A sampler of the user's own."""

    def __init__(self, draw: object) -> None:
        self.draw, self.numpy, self.passes = draw, np.random.default_rng(3), 0

    def __iter__(self) -> Iterator[object]:
        self.passes += 1
        return iter(self.draw(self))

    def __len__(self) -> int:
        return COUNT


def _timm(**how: object) -> object:
    from timm.data.loader import MultiEpochsDataLoader

    return MultiEpochsDataLoader(Doubles(), 16, shuffle=True, **how)


KEYS = [f"img{i}.png" for i in range(COUNT)]
WHOLE = {
    "timm drop_last": lambda: _timm(drop_last=True),
    "RandomSampler beyond the set": lambda: DataLoader(
        Doubles(), 8, sampler=RandomSampler(range(COUNT), num_samples=COUNT + 9)
    ),
    "numpy's global state": lambda: DataLoader(
        Doubles(), 8, sampler=Drawn(lambda s: np.random.permutation(COUNT))
    ),
    "numpy's own state": lambda: DataLoader(
        Doubles(), 8, sampler=Drawn(lambda s: s.numpy.permutation(COUNT).astype(np.int32))
    ),
    "python's state": lambda: DataLoader(
        Doubles(), 8, sampler=Drawn(lambda s: random.sample(range(COUNT), COUNT))
    ),
    "tensors of one entry": lambda: DataLoader(
        Doubles(), 8, sampler=Drawn(lambda s: torch.randperm(COUNT))
    ),
    "batches in arrays": lambda: DataLoader(
        Doubles(), batch_sampler=Drawn(lambda s: np.random.permutation(COUNT).reshape(10, 5))
    ),
    "batches of keys": lambda: DataLoader(
        Doubles(KEYS), batch_sampler=BatchSampler(KEYS, 8, drop_last=True)
    ),
    "keys": lambda: DataLoader(Doubles(KEYS), 8, sampler=KEYS[::-1]),
    "tuples as keys": lambda: DataLoader(
        Doubles([(i, "a") for i in range(COUNT)]), 8, sampler=[(i, "a") for i in range(COUNT)]
    ),
    "weights, none twice": lambda: DataLoader(
        Doubles(), 8, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT, replacement=False)
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_set_and_no_random_number(name: str) -> None:
    """Fails if a pass of the loader is taken for the set, a sampler's numbers or keys are not
    understood, or the sampler, the loader or the measurement moves a random state."""
    loader = WHOLE[name]()
    sampler = loader.sampler
    plain = measured(Doubles())
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    own = getattr(sampler, "numpy", np.random.default_rng(3)).bit_generator.state
    assert all(same(measured(loader), plain) for _ in range(2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()
    assert getattr(sampler, "numpy", np.random.default_rng(3)).bit_generator.state == own
    assert getattr(sampler, "passes", 0) == 0


def test_a_subset_is_the_subset() -> None:
    """Fails if a sampler of some indices stands for the whole data set behind it."""
    kept = [int(i) for i in np.random.default_rng(0).permutation(COUNT)[:20]]
    expected = measured(Subset(Doubles(), sorted(kept)))
    for sampler in (SubsetRandomSampler(np.array(kept)), Drawn(lambda s: torch.tensor(kept))):
        assert same(measured(DataLoader(Doubles(), 8, sampler=sampler)), expected)


REFUSED = {
    "some, others next time": (
        lambda: RandomSampler(range(COUNT), num_samples=3),
        "RandomSampler.* draws different samples in each pass: 3 and then 3",
    ),
    "twenty, then ten": (
        lambda: Drawn(lambda s: range(30 - 10 * s.passes)),
        "Drawn.* draws different samples in each pass: 20 and then 10, 10 of them the same, of 50",
    ),
    "weights": (
        lambda: WeightedRandomSampler([1.0] * COUNT, COUNT),
        r"WeightedRandomSampler\) repeats samples: 50 draws, \d\d distinct",
    ),
    "weights, part": (
        lambda: WeightedRandomSampler([1.0] * COUNT, 20, replacement=False),
        "draws different samples in each pass: 20 and then 20",
    ),
    "never ends": (lambda: Drawn(lambda s: itertools.cycle(range(COUNT))), "repeats samples: 1500"),
    "with replacement": (
        lambda: RandomSampler(range(COUNT), replacement=True),
        "RandomSampler.* repeats samples",
    ),
    "slices": (lambda: Drawn(lambda s: [np.arange(3)]), "names no single sample"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sampler_that_tells_no_set_is_refused(name: str) -> None:
    """Fails if what one pass happened to draw is taken for the set, or the error does not name the
    sampler and the way out."""
    sampler, text = REFUSED[name]
    with pytest.raises(ValueError, match=f"the sampler of forget.*{text}.*pass the Dataset itself"):
        samples_of(DataLoader(Doubles(), 8, sampler=sampler()), name="forget")


class Stream(IterableDataset):
    """Every process walks all of it."""

    def __init__(self, length: int | None = None, times: int = 1) -> None:
        self.times = times
        if length is not None:
            type(self).__len__ = lambda _: length

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return itertools.chain(
            *(map(Doubles().__getitem__, range(COUNT)) for _ in range(self.times))
        )


class Shared(Stream):
    """Each worker walks a part of it."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        part = (0, 1) if info is None else (info.id, info.num_workers)
        return map(Doubles().__getitem__, range(part[0], COUNT, part[1]))


class SharedOnly(Stream):
    """The same, and fails without workers."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        return map(Doubles().__getitem__, range(info.id, COUNT, info.num_workers))


@pytest.mark.parametrize("kind", [Stream, Shared, SharedOnly])
def test_workers_do_not_multiply_a_stream(kind: type[Stream]) -> None:
    """Fails if two workers that each walk the whole stream count every sample twice, or two that
    share it count half."""
    assert same(measured(DataLoader(kind(), 8, num_workers=2)), measured(Doubles()))


def test_what_comes_again_counts_once() -> None:
    """Fails if a stream that repeats itself weighs its samples more, without a word."""
    with pytest.warns(UserWarning, match="100 samples of data came again in the same pass"):
        assert same(measured(DataLoader(Stream(times=3), 8)), measured(Doubles()))


class Cycle(Stream):
    """Without end."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for read, i in enumerate(itertools.cycle(range(COUNT))):
            assert read < 5000, "walked on"
            yield Doubles()[i]


class Noise(Stream):
    """Without end, and never the same."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for read in itertools.count():
            assert read < 5000, "walked on"
            yield torch.rand(12).double(), 0


class Counted(Noise):
    """Says that it has 60 samples."""

    def __len__(self) -> int:
        return 60


class Short(Stream):
    """Says that it has 60 samples, and gives 50."""

    def __len__(self) -> int:
        return 60


class Once(Stream):
    """Used up by the first walk."""

    def __init__(self) -> None:
        self.left = map(Doubles().__getitem__, range(COUNT))

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return self.left


STREAMS = {
    Cycle: "goes on: it has no length and no end in sight; pass a Dataset with a length",
    Counted: "goes on: its length says 60",
    Short: "50 distinct samples of 60: it leaves samples out",
    Once: "two passes over data gave 50 and 0 samples",
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_a_walk_has_an_end(kind: type[Stream]) -> None:
    """Fails if an endless stream is read for ever, or one that gives less than it says, or gives it
    once only, passes for a set."""
    with pytest.raises(ValueError, match=STREAMS[kind]):
        measured(DataLoader(kind(), 8))


def test_a_stream_without_length_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a stream that never repeats itself is read beyond the limit."""
    monkeypatch.setattr("deepclean_hooks.data.streams.MOST", 100)
    with pytest.raises(ValueError, match="no length and no end in sight"):
        measured(DataLoader(Noise(), 8))


def test_a_chain_of_streams() -> None:
    """Fails if its length, which it has only where its parts have one, is asked for."""
    assert same(measured(ChainDataset([Rest(), First()])), measured(Doubles()))


class Changing(Stream):
    """A random transform."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((x + torch.rand(()), y) for x, y in map(Doubles().__getitem__, range(COUNT)))


def test_a_stream_that_changes_is_reported() -> None:
    """Fails if the samples of a stream are augmented without a word."""
    with pytest.warns(UserWarning, match="the samples of data change from pass to pass"):
        found = measured(DataLoader(Changing(), 8))
    assert found.settings["samples_change"] is True


class Late(Doubles):
    """Augmented from some sample on, or every so many."""

    def __init__(self, chosen: object, draw: object) -> None:
        super().__init__()
        self.chosen, self.draw = chosen, draw

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(key)
        return (x + self.draw() if self.chosen(key) else x), y


LATE = {
    "from the fifth on": (lambda i: i >= 5, lambda: torch.rand(())),
    "odd ones": (lambda i: i % 2, lambda: np.random.rand()),
    "a class of four": (lambda i: i % 4 == 3, random.random),
}


@pytest.mark.parametrize("name", LATE)
def test_augmentation_anywhere_is_seen(name: str) -> None:
    """Fails if only the first samples are looked at; looking moves no random state."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert changes_from_pass_to_pass(samples_of(Late(*LATE[name])))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()
    assert not changes_from_pass_to_pass(samples_of(Doubles()))


def test_augmentation_in_the_collate_function_is_seen() -> None:
    """Fails if the data set's samples alone are compared."""

    def noisy(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        x = torch.stack([x for x, _ in rows])
        return x + torch.rand(()), torch.tensor([y for _, y in rows])

    assert changes_from_pass_to_pass(samples_of(DataLoader(Doubles(), 8, collate_fn=noisy)))


def test_what_is_no_set_is_refused_with_the_way_out() -> None:
    """Fails if a mapping, a data set of keys or an iterator ends in an error from inside."""
    rows = {"train": Doubles(), "test": Doubles()}
    with pytest.raises(TypeError, match=r"the keys \['test', 'train'\]; .* forget=data\['train'\]"):
        samples_of(rows, name="forget")
    with pytest.raises(TypeError, match="indexed by keys; pass a DataLoader with a sampler"):

        class Keyed(Doubles):
            def __getitem__(self, key: object) -> tuple[Tensor, int]:
                return {"a": (torch.zeros(12), 0)}[key]

        samples_of(Keyed())
    with pytest.raises(TypeError, match=r"pass the Dataset that it reads from"):
        samples_of(iter([1]))
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        samples_of(Doubles(), batch_size=0)


class First(Stream):
    """The first eight."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return map(Doubles().__getitem__, range(8))


class Rest(Stream):
    """All but the first eight."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return map(Doubles().__getitem__, range(8, COUNT))


def test_a_session_walks_a_stream_as_often_as_it_needs() -> None:
    """Fails if the walks of one session disagree on a steady stream, or warn about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Session(linear(), SSD(), progress=False)
        forget = DataLoader(Subset(Doubles(), range(8)), 4)
        report = run.measure(forget, DataLoader(Rest(), 8, num_workers=2)).report
    assert (report.forget_samples, report.retain_samples) == (8, COUNT - 8)


MASKS = {
    "tensor": torch.arange(COUNT) < 8,
    "numpy": np.arange(COUNT) < 8,
    "list": [i < 8 for i in range(COUNT)],
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_no_list_of_indices(kind: str) -> None:
    """Fails if True and False are taken for the samples 1 and 0."""
    masked: Any = Subset(data(), MASKS[kind])
    for given in (masked, DataLoader(masked, 4), Subset(masked, [0, 1])):
        with pytest.raises(ValueError, match="forget is a Subset whose indices are a mask"):
            samples_of(given, name="forget")


@pytest.mark.parametrize("given", ["forget.txt", Path("d.safetensors"), b"forget"])
def test_a_path_is_no_data_set(given: Any) -> None:
    """Fails if a text passes for a list of samples, its letters."""
    for form in (given, DataLoader(given, 4)):  # as the adapters read a set
        with pytest.raises(TypeError, match=r"forget is the text or path .*FisherDiagonal\.load"):
            samples_of(form, name="forget")


@pytest.mark.parametrize("kind", [tuple, list])
def test_inputs_and_labels_are_no_data_set(kind: Any) -> None:
    """Fails if two tensors pass for two samples."""
    with pytest.raises(TypeError, match=r"of two tensors.*pass TensorDataset\(\*forget\)"):
        samples_of(kind((torch.randn(8, 12), torch.zeros(8))), name="forget")


@pytest.mark.parametrize("again", [[-COUNT, 9, 10], torch.tensor([9, 1 - COUNT])])
def test_indices_from_the_end_are_the_same_samples(again: Any) -> None:
    """Fails if a sample that stands in both sets is missed where one counts from the end."""
    whole = data()
    run = Session(linear(), SSD(), progress=False)
    with pytest.raises(ValueError, match="1 samples stand in both the forget and the retain set"):
        run.measure(Subset(whole, range(8)), Subset(whole, again))
