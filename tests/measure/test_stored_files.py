"""A stored measurement is believed only if it is what was written: digest, numbers, counts."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.data import batches
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.measure.layer_inputs import InputGrams, LayerInputs
from deepclean_hooks.measure.request import Request
from deepclean_hooks.report import forgotten


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(first: int = 0, last: int = 30) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 6, generator=generator), torch.randint(3, (30,), generator=generator)
    return TensorDataset(x[first:last], y[first:last])


def diagonal(*part: int) -> deepclean.FisherDiagonal:
    return deepclean.fisher_diagonal(model(), data(*part), progress=False)


def grams() -> InputGrams:
    return LayerInputs()(Request(model(), samples_of(data()), progress=False))


@pytest.mark.parametrize("made", [diagonal, grams])
def test_no_flipped_bit_is_believed(made: object, tmp_path: Path) -> None:
    """Fails if one of 150 flips, anywhere in the file, is read as another measurement."""
    path = tmp_path / "stored"
    made().save(path)
    raw = path.read_bytes()
    drawn = random.Random(0)
    for _ in range(150):
        flipped = bytearray(raw)
        flipped[drawn.randrange(len(raw))] ^= 1 << drawn.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=str(path)):
            type(made()).load(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "longer", "a folder"])
def test_other_damage_is_named(damage: str, tmp_path: Path) -> None:
    """Fails if the library's own error comes out, which is no ValueError and names no file."""
    path = tmp_path / "stored"
    diagonal().save(path)
    raw = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        content = {"cut": raw[:-20], "empty": b"", "text": b"x", "longer": raw + b"x"}[damage]
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is"):
        deepclean.FisherDiagonal.load(path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    """Fails if a path that was mistyped is called damaged."""
    with pytest.raises(FileNotFoundError):
        deepclean.FisherDiagonal.load(tmp_path / "nowhere")


NONSENSE = {
    "NaN": (lambda d: {n: t * float("nan") for n, t in d.sums.items()}, None, "NaN or infinite"),
    "negative": (lambda d: {n: -t for n, t in d.sums.items()}, None, "is negative"),
    "negative count": (lambda d: d.sums, -7, "claims -7 terms of 30 samples"),
    "count above the samples": (lambda d: d.sums, 31, "claims 31 terms of 30 samples"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_what_no_measurement_holds(name: str, tmp_path: Path) -> None:
    """Fails if nonsense is stored, is read from a file of an earlier version, which has no digest,
    or is used as it stands in memory."""
    change, count, text = NONSENSE[name]
    good = diagonal()
    bad = deepclean.FisherDiagonal(
        change(good), good.count if count is None else count, good.samples, good.settings
    )
    with pytest.raises(ValueError, match=text):
        bad.save(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()

    good.save(tmp_path / "good")
    with safe_open(tmp_path / "good", framework="pt") as file:
        metadata = {**file.metadata(), "format": "deepclean-hooks fisher diagonal 1"}
    del metadata["digest"]
    metadata["count"] = str(bad.count)
    tensors = load_file(tmp_path / "good")
    tensors.update({f"sums/{n}": t for n, t in bad.sums.items()})
    save_file(tensors, tmp_path / "old", metadata)
    with pytest.raises(ValueError, match=f"{tmp_path}/old .*{text}"):
        deepclean.FisherDiagonal.load(tmp_path / "old")

    run = deepclean.Session(model(), deepclean.DeepClean(), progress=False, scores=False)
    with pytest.raises(ValueError, match=text):
        run.measure(data(0, 8), bad)


def test_a_digest_cannot_be_left_out(tmp_path: Path) -> None:
    """Fails if a file of today's version passes without its digest."""
    path = tmp_path / "stored"
    diagonal().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    del metadata["digest"]
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match="its digest is missing"):
        deepclean.FisherDiagonal.load(path)


WORDS = [(torch.full((3 + i % 7,), i + 3), i % 3) for i in range(24)]


def padded(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(tokens) for tokens, _ in samples)
    tokens = torch.stack([pad(t, (0, longest - len(t))) for t, _ in samples])
    return tokens, torch.tensor([label for _, label in samples])


class Text(nn.Module):
    """Means of embeddings, padding left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(50, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mean = self.embedding(tokens).sum(1) / (tokens != 0).sum(1, keepdim=True)
        return self.head(mean)


def texts(samples: list[tuple[torch.Tensor, int]], size: int) -> DataLoader:
    return DataLoader(samples, size, collate_fn=padded)


def test_padding_hides_no_sample() -> None:
    """Fails if a sample is known by its padded row: in batches of another composition it then has
    another fingerprint, duplicates go unseen and a stored set refuses the request."""
    forget, everything = texts(WORDS[::3], 4), texts(WORDS, 6)
    run = deepclean.Session(Text(), deepclean.DeepClean(), progress=False, scores=False)
    with pytest.raises(ValueError, match="all 8 forget samples stand in the retain set"):
        run.measure(forget, everything)
    stored = deepclean.fisher_diagonal(Text(), everything, progress=False)
    run = deepclean.Session(Text(), deepclean.DeepClean(), progress=False, scores=False)
    report = run.measure(forget, stored).report
    assert report.retain_samples == 16
    told = forgotten.samples_among(report.forgotten, texts(WORDS, 5))
    assert told == [i % 3 == 0 for i in range(24)]


def test_a_set_of_padded_rows_is_refused_with_the_reason() -> None:
    """Fails if a diagonal of an earlier version, whose rows match in part or not at all, is taken
    for the retain set's."""
    stored = deepclean.fisher_diagonal(Text(), texts(WORDS, 6), progress=False)
    parts = [WORDS[at : at + 6] for at in range(0, 24, 6)]
    rows = [known for part in parts for known in batches.sample_ids(padded(part))]
    settings = {k: v for k, v in stored.settings.items() if k != "fingerprints"}
    old = deepclean.FisherDiagonal(
        stored.sums, 24, torch.tensor(sorted(rows)), json.loads(json.dumps(settings))
    )
    run = deepclean.Session(Text(), deepclean.DeepClean(), progress=False, scores=False)
    with pytest.raises(ValueError, match=r"as earlier versions did.* measure the training set"):
        run.measure(texts(WORDS[::3], 4), old)


def test_a_set_of_plain_rows_still_serves() -> None:
    """Fails if an earlier version's file of samples that are collated as they are is not read."""
    stored = diagonal()
    settings = {k: v for k, v in stored.settings.items() if k != "fingerprints"}
    x, y = data().tensors
    old = deepclean.FisherDiagonal(
        stored.sums, 30, torch.tensor(sorted(batches.sample_ids((x, y)))), settings
    )
    run = deepclean.Session(model(), deepclean.DeepClean(), progress=False, scores=False)
    assert run.measure(data(0, 8), old).report.retain_samples == 22
