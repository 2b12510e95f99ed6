"""FisherDiagonal: each sample once, additive, stored whole, and errors that name thing, value and
way out."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from deepclean_hooks import (
    SSD,
    DeepClean,
    FisherDiagonal,
    Session,
    fisher_diagonal,
    ranks,
    unlearning,
)
from deepclean_hooks.data import batches
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.measure.batch_mean import BatchMean
from deepclean_hooks.measure.fisher import PerSampleFisher
from deepclean_hooks.measure.request import Request
from deepclean_hooks.model import no_trace
from deepclean_hooks.ranks import collectives
from lab import small
from lab.reference import relative_error, squared_gradients

network = partial(small.network, dtype=torch.float64)


def samples(n: int = 13) -> TensorDataset:
    """n samples in float64."""
    return small.samples(0, n, torch.float64, of=n)


def same(one: FisherDiagonal, other: FisherDiagonal) -> bool:
    """Whether two diagonals are of the same samples and agree to 1e-12."""
    counted = one.count == other.count and torch.equal(one.samples, other.samples)
    return counted and relative_error(one.sums, other.sums) <= 1e-12


class Stream(IterableDataset):
    """The samples without indices."""

    def __iter__(self):
        return iter(samples())


LOADERS = {
    "batches of 5 and 3": lambda d: DataLoader(d, batch_size=5),
    "batches of 1": lambda d: DataLoader(d, batch_size=1),
    "shuffled": lambda d: DataLoader(d, batch_size=4, shuffle=True),
    "drop_last": lambda d: DataLoader(d, batch_size=4, shuffle=True, drop_last=True),
    "reversed by a sampler": lambda d: DataLoader(d, batch_size=4, sampler=range(12, -1, -1)),
    "subset sampler": lambda d: DataLoader(d, batch_size=4, sampler=SubsetRandomSampler(range(13))),
    "batch sampler": lambda d: DataLoader(d, batch_sampler=BatchSampler(range(13), 4, True)),
    "workers": lambda d: DataLoader(d, batch_size=4, num_workers=1),
    "iterable": lambda d: DataLoader(Stream(), batch_size=4),
    "dataset": lambda d: d,
    "subset": lambda d: Subset(d, list(range(13))[::-1]),
}


@pytest.mark.parametrize("name", LOADERS)
def test_each_sample_once(name: str) -> None:
    """Fails if batch size, order, shuffling, drop_last or workers change the sums or the count."""
    model, data = network(), samples()
    plain = fisher_diagonal(model, DataLoader(data, batch_size=13))
    assert plain.count == 13
    assert same(fisher_diagonal(model, LOADERS[name](data)), plain)


def test_batch_mean_is_another_number() -> None:
    """The opposite: squares of batch means do change with the batch size, so the invariance above
    says something."""
    model, (x, y) = network().eval(), samples().tensors

    def batch_mean(size: int) -> Tensor:
        total = torch.zeros(5, 64, dtype=torch.float64)
        for start in range(0, 12, size):
            loss = F.cross_entropy(model(x[start : start + size]), y[start : start + size])
            total += torch.autograd.grad(loss, model[4].weight)[0] ** 2 * size
        return total

    assert (batch_mean(2) - batch_mean(6)).abs().max() > 0.1 * batch_mean(2).max()


def test_mean_divides_by_the_count_once() -> None:
    """Fails if sums are divided before they are added, or by the number of batches."""
    model, data = network(), samples()
    truth = squared_gradients(model, *data.tensors)
    mean = fisher_diagonal(model, data, batch_size=4).mean()
    assert relative_error(mean, {n: t / 13 for n, t in truth.items()}) <= 1e-12


def test_custom_loss() -> None:
    """Fails if loss_fn's own gradients are not the ones squared."""

    def smoothed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.3)

    model, data = network(), samples()
    truth = squared_gradients(
        model,
        *data.tensors,
        loss=lambda out, y: F.cross_entropy(out, y, reduction="none", label_smoothing=0.3),
    )
    assert relative_error(fisher_diagonal(model, data, loss_fn=smoothed).sums, truth) <= 1e-12


def test_mapping_batches() -> None:
    """Fails if Hugging Face batches (a mapping in, .logits out) are counted otherwise than (x,
    y)."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(pixel_values)}

    rows = [{"pixel_values": x, "labels": y} for x, y in samples()]
    found = fisher_diagonal(Wrapped(), rows, batch_size=4)
    plain = fisher_diagonal(network(), samples())
    assert (
        relative_error({n.removeprefix("inner."): s for n, s in found.sums.items()}, plain.sums)
        <= 1e-12
    )


def test_samples_are_known_as_they_were_read() -> None:
    """Fails if fingerprints are taken after a batch was converted to the model's precision: whoever
    looks a sample up has it as the data set gives it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).bfloat16().eval()
    x, y = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.arange(5) % 3
    found = fisher_diagonal(model, TensorDataset(x, y), batch_size=2)
    assert found.samples.tolist() == sorted(batches.sample_ids((x, y)))
    assert found.samples.tolist() != sorted(batches.sample_ids((x.float(), y)))


def test_parameters_predicate_and_frozen_parameters() -> None:
    """Fails if an unwanted or frozen parameter is measured, or if leaving it out changes the
    others."""
    model, data = network(), samples()
    every = fisher_diagonal(model, data)
    matrices = fisher_diagonal(model, data, parameters=lambda name, p: p.dim() > 1)
    assert set(matrices.sums) == {"0.weight", "4.weight"}
    assert relative_error(matrices.sums, {n: every.sums[n] for n in matrices.sums}) <= 1e-12
    model[0].requires_grad_(False)
    assert set(fisher_diagonal(model, data).sums) == set(every.sums) - {"0.weight", "0.bias"}
    assert not model[0].weight.requires_grad


def test_sets_add_and_subtract() -> None:
    """Fails if D_f + D_r is not D, or D - D_f not D_r, in sums, count or samples."""
    model, data = network(), samples()
    forget, retain = Subset(data, range(4)), Subset(data, range(4, 13))
    f, r, d = (fisher_diagonal(model, s) for s in (forget, retain, data))
    assert same(f + r, d)
    assert same(d - f, r)
    assert all((t >= 0).all() for t in (d - d).sums.values())


def test_subtraction_refuses_foreign_samples() -> None:
    """Fails if samples that were never in a diagonal can be taken out of it."""
    model, data = network(), samples()
    part = fisher_diagonal(model, Subset(data, range(5)))
    other = fisher_diagonal(model, Subset(data, range(3, 8)))
    with pytest.raises(ValueError, match="3 of the 5 samples to take out are not among the 5"):
        part - other


def test_diagonals_of_two_models_do_not_mix() -> None:
    """Fails if sums of other weights are added."""
    one = fisher_diagonal(network(), samples())
    model = network()
    model[4].bias.data[0] += 1e-9
    with pytest.raises(ValueError, match="different model weights"):
        one + fisher_diagonal(model, samples())
    with pytest.raises(ValueError, match="belongs to the model"):
        one.require_model(model)


def test_save_and_load(tmp_path: Path) -> None:
    """Fails if a bit of the sums, the count, the samples or the settings is lost on the way."""
    model, path = network(), tmp_path / "d.safetensors"
    stored = fisher_diagonal(model, samples())
    stored.save(path)
    loaded = FisherDiagonal.load(path)
    assert all(torch.equal(loaded.sums[n], s) for n, s in stored.sums.items())
    assert (loaded.count, loaded.settings) == (stored.count, stored.settings)
    assert torch.equal(loaded.samples, stored.samples)
    loaded.require_model(model)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_save_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a write that breaks off damages the file that was there."""
    path = tmp_path / "d.safetensors"
    stored = fisher_diagonal(network(), samples())
    stored.save(path)
    before = path.read_bytes()

    def broken(tensor: Tensor) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr("deepclean_hooks.stored.tensor_file.bits.as_bytes", broken)
    with pytest.raises(OSError, match="disk full"):
        stored.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_load_refuses_another_file(tmp_path: Path) -> None:
    """Fails if any safetensors file passes for a diagonal."""
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no stored FisherDiagonal"):
        FisherDiagonal.load(tmp_path / "x.safetensors")


def scalar(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mistake of a loss that hides the samples."""
    return F.cross_entropy(model(batch[0]), batch[1])


def with_labels(y: Tensor) -> TensorDataset:
    """Thirteen samples with other labels."""
    return TensorDataset(samples().tensors[0], y)


BAD = {
    "empty": (lambda: Subset(samples(), []), {}, ValueError, "data is empty: it has 0 samples"),
    "empty loader": (lambda: DataLoader(Subset(samples(), [])), {}, ValueError, "data is empty"),
    "empty stream": (
        lambda: DataLoader(Empty(), batch_size=2),
        {},
        ValueError,
        "data is empty: its loader yielded no batch",
    ),
    "label too large": (
        lambda: with_labels(torch.arange(13) % 7),
        {},
        ValueError,
        r"data, batch 0: label 6 is out of range: the model has 5 classes, 0 to 4",
    ),
    "label negative": (
        lambda: with_labels(torch.full((13,), -100)),
        {},
        ValueError,
        "label -100 is out of range",
    ),
    "float labels": (
        lambda: with_labels(torch.rand(13)),
        {},
        ValueError,
        r"labels must be class indices \(int64\), got torch.float32",
    ),
    "one-hot labels": (
        lambda: with_labels(torch.zeros(13, 5, dtype=torch.int64)),
        {},
        ValueError,
        r"labels must have shape \(\d,\), one per sample, got \(\d, 5\)",
    ),
    "scalar loss": (samples, {"loss_fn": scalar}, ValueError, 'reduction="none"'),
    "batch of three": (
        lambda: TensorDataset(*samples().tensors, torch.zeros(13)),
        {},
        TypeError,
        r"a batch must be \(x, y\) or a mapping with 'labels', got list of length 3",
    ),
    "mapping without labels": (
        lambda: [{"pixels": x, "kind": y, "group": y} for x, y in samples()],
        {},
        TypeError,
        r"needs the key 'labels', or a single .* got the keys \['group', 'kind', 'pixels'\]",
    ),
    "no data set": (lambda: iter([1]), {}, TypeError, "must be a DataLoader or a Dataset"),
    "repeating sampler": (
        lambda: DataLoader(samples(), sampler=WeightedRandomSampler([1.0] * 13, 40)),
        {},
        ValueError,
        r"the sampler of data \(WeightedRandomSampler\) repeats samples: 40 draws",
    ),
    "stream that drops": (
        lambda: DataLoader(Stream(), batch_size=4, drop_last=True),
        {},
        ValueError,
        "drop_last=True, which leaves samples out",
    ),
    "no parameter accepted": (
        samples,
        {"parameters": lambda name, p: False},
        ValueError,
        "accepts none of the 6 trainable parameters",
    ),
}


class Empty(IterableDataset):
    """A stream without samples."""

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    """Fails if bad data is measured, or refused without naming thing, value and way out, or after a
    change."""
    data, options, error, text = BAD[name]
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=text):
        fisher_diagonal(
            model,
            data(),
            **{"batch_size": 8, **options} if name != "repeating sampler" else options,
        )
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_loss_that_cannot_be_hashed() -> None:
    """Fails if what was found out about a model is filed under the loss's own idea of equality."""

    @dataclass
    class Smoothed:
        smoothing: float

        def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            found = F.cross_entropy(
                model(batch[0]), batch[1], reduction="none", label_smoothing=self.smoothing
            )
            return found

    data = TensorDataset(torch.randn(4, 1, 6, 6, dtype=torch.float64), torch.arange(4))
    plain = fisher_diagonal(network(), data, progress=False)
    own = fisher_diagonal(network(), data, loss_fn=Smoothed(0.0), progress=False)
    assert relative_error(own.sums, plain.sums) <= 1e-12
    other = fisher_diagonal(network(), data, loss_fn=Smoothed(0.5), progress=False)
    assert relative_error(other.sums, plain.sums) > 0.1


class Wrapped:
    """As Lightning shows the user's own sampler to a DistributedSampler."""

    def __init__(self, sampler: SubsetRandomSampler) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)


def test_sampler_inside_a_distributed_one() -> None:
    """Fails if the numbers of draws are taken for the indices of samples."""
    data = TensorDataset(torch.zeros(9, 1), torch.zeros(9, dtype=torch.int64))
    wrapped = Wrapped(SubsetRandomSampler([2, 5, 8]))
    sampler = DistributedSampler(wrapped, num_replicas=2, rank=0)
    assert samples_of(DataLoader(data, sampler=sampler)).indices == (2, 5, 8)
    del wrapped._sampler
    with pytest.raises(ValueError, match="of another data set than the loader"):
        samples_of(DataLoader(data, sampler=sampler))


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("ValueError", ValueError),
        ("NotImplementedError", NotImplementedError),
        ("RuntimeError", RuntimeError),
    ],
)
def test_ranks_fail_by_the_same_kind_of_error(
    name: str, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one rank catches an error that comes as another one elsewhere: json's own errors are
    ValueErrors."""
    told: list[object] = []
    monkeypatch.setattr(collectives, "gather", lambda value: [told.append(value) or value])
    with pytest.raises(json.JSONDecodeError), ranks.fail_together():
        json.loads("{")
    assert told[0][0] == "ValueError"
    monkeypatch.setattr(collectives, "gather", lambda value: [value, (name, "there")])
    with pytest.raises(raised, match="another rank failed: there"), ranks.fail_together():
        pass


def test_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a Mac's GPU meets its limit somewhere inside, with torch's words for it."""
    data = TensorDataset(torch.zeros(4, 1, 6, 6, dtype=torch.float64), torch.arange(4))
    monkeypatch.setattr(no_trace, "device_of", lambda _: torch.device("mps"))
    with pytest.raises(ValueError, match=r"float64, .* mps does not have; .*model.cpu\(\)"):
        fisher_diagonal(network(), data)
    with pytest.raises(ValueError, match="mps does not have"):
        Session(network(), SSD(), scores=False).measure(Subset(data, [0]), Subset(data, [1, 2, 3]))
    monkeypatch.undo()
    fisher_diagonal(network(), data, accumulate=torch.float32, progress=False)


def test_model_without_trainable_parameter() -> None:
    """Fails if a wholly frozen model is measured as all zero."""
    with pytest.raises(
        ValueError, match="no trainable parameter: requires_grad is False for all 6"
    ):
        fisher_diagonal(network().requires_grad_(False), samples())


def test_nan_input_names_the_batch() -> None:
    """Fails if a NaN loss is summed, or its batch is not named."""
    data = samples()
    data.tensors[0][9, 0, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"data, batch 2: the loss of sample 1 of the batch is nan"
    ):
        fisher_diagonal(network(), data, batch_size=4)


def test_nan_gradient_names_parameter_and_batch() -> None:
    """Fails if a finite loss with an infinite gradient goes into the sums: sqrt at 0."""

    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).abs().sqrt()

    x = torch.ones(40, 3)
    x[33] = 0
    data = TensorDataset(x, torch.zeros(40, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"data, batch 16: the gradient of head.weight is NaN or infinite"
    ):
        fisher_diagonal(Rooted(), data, batch_size=2)


def test_augmenting_data_is_reported() -> None:
    """Fails if samples that change from pass to pass go unnoticed."""

    class Augmented(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(index)
            return x + torch.rand(()), y

    with pytest.warns(UserWarning, match="the samples of data change from pass to pass"):
        found = fisher_diagonal(network(), Augmented(*samples().tensors))
    assert found.settings["samples_change"] is True
    assert fisher_diagonal(network(), samples()).settings["samples_change"] is False


class Bag(nn.Module):
    """Classes of the mean of a few rows of a table."""

    def __init__(self, table: nn.Embedding | nn.EmbeddingBag) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(x)
        return self.head(rows if rows.dim() == 2 else rows.mean(1))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_measured(kind: Any) -> None:
    """Fails if an embedding with sparse gradients cannot be measured, or gives other numbers."""
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))[:20]
    words = TensorDataset(pairs, torch.arange(20) % 3)
    torch.manual_seed(0)
    dense = Bag(kind(6, 4))
    sparse = Bag(kind(6, 4, sparse=True))
    sparse.load_state_dict(dense.state_dict())
    for estimator in (PerSampleFisher(), BatchMean(batch_size=4)):
        wanted, found = (
            estimator(Request(model, samples_of(words), progress=False))
            for model in (dense, sparse)
        )
        for name, total in wanted.sums.items():
            torch.testing.assert_close(found.sums[name], total)
    with unlearning(
        sparse,
        forget=Subset(words, range(5)),
        retain=Subset(words, range(5, 20)),
        method=DeepClean(gamma=1.0),
        scores=False,
        progress=False,
    ) as run:
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        for x, y in DataLoader(words, 5):
            F.cross_entropy(sparse(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert run.report.frozen_entries_moved == 0
