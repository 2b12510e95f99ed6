"""The same pictures and labels from a folder, tables, Hugging Face's datasets and torchvision."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest

from deepclean_hooks.cli.datasets import DataOptions, Pictures, opened
from deepclean_hooks.cli.what import WhatOptions, chosen
from lab import pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, and a table of them in .csv, .tsv, .parquet and for `datasets`, with the
    columns path, label and subject."""
    import datasets

    made = tmp_path_factory.mktemp("data")
    pictures.write(made / "train", each=4)
    rows = [
        {"path": str(path.relative_to(made)), "label": path.parent.name, "subject": 4700 + i % 5}
        for i, path in enumerate(sorted((made / "train").rglob("*.png")))
    ]
    for name, delimiter in (("table.csv", ","), ("table.tsv", "\t")):
        with open(made / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(made / "table.parquet")
    images = datasets.Dataset.from_dict(
        {
            "image": [str(made / row["path"]) for row in rows],
            "label": [pictures.CLASSES.index(row["label"]) for row in rows],
            "subject": [row["subject"] for row in rows],
        },
        features=datasets.Features(
            image=datasets.Image(),
            label=datasets.ClassLabel(names=list(pictures.CLASSES)),
            subject=datasets.Value("int64"),
        ),
    )
    images.save_to_disk(made / "hf")
    datasets.DatasetDict(train=images, test=images.select([0])).save_to_disk(made / "hf2")
    return made


def content(data: Pictures) -> list[tuple[bytes, int]]:
    return [(np.asarray(picture).tobytes(), label) for picture, label in data]  # type: ignore[misc]


FORMS = ["train", "table.csv", "table.tsv", "table.parquet", "hf", "hf2:train"]


@pytest.mark.parametrize("form", FORMS)
def test_forms_hold_the_same(folder: Path, form: str) -> None:
    """Fails if a form loses a sample, exchanges labels or decodes pictures otherwise."""
    data = opened(str(folder / form), DataOptions(data=""))
    assert data.classes == list(pictures.CLASSES)
    truth = opened(str(folder / "train"), DataOptions(data=""))
    assert [content(data)[i] for i in range(12)] == [content(truth)[i] for i in range(12)]


@pytest.mark.parametrize("form", FORMS[1:])
def test_everything_of_a_person(folder: Path, form: str) -> None:
    """Fails if a column's value is compared as another type than it has."""
    data = opened(str(folder / form), DataOptions(data=""))
    gone, kept = chosen(data, WhatOptions(forget_where=["subject=4703"]))
    assert gone.indices == [3, 8]
    assert len(kept) == 10


@pytest.mark.parametrize("form", FORMS)
def test_names_in_a_list(folder: Path, tmp_path: Path, form: str) -> None:
    """Fails if a path, or a position where samples have no files, names another sample."""
    data = opened(str(folder / form), DataOptions(data=""))
    (tmp_path / "gone.txt").write_text("4\n11\n" if "hf" in form else "bee/00.png\ncat/03.png\n")
    gone, _ = chosen(data, WhatOptions(forget=[tmp_path / "gone.txt"]))
    assert gone.indices == [4, 11]


@pytest.mark.parametrize("form", ["table.csv", "hf"])
def test_ids_in_a_list(folder: Path, tmp_path: Path, form: str) -> None:
    """Fails if --id-column is not what names samples, or an id of several samples is taken."""
    options = DataOptions(data="", id_column="subject")
    data = opened(str(folder / form), options)
    (tmp_path / "gone.txt").write_text("4703\n")
    with pytest.raises(ValueError, match="'4703' names 2 samples"):
        chosen(data, WhatOptions(forget=[tmp_path / "gone.txt"]))


def test_requests_add_up(folder: Path, tmp_path: Path) -> None:
    """Fails if of several ways to say what to forget only one is followed."""
    (tmp_path / "gone.txt").write_text("bee/00.png\n")
    data = opened(str(folder / "table.csv"), DataOptions(data=""))
    asked = WhatOptions(
        forget=[tmp_path / "gone.txt"], forget_class=["cat"], forget_where=["subject=4701"]
    )
    assert chosen(data, asked)[0].indices == [1, 4, 6, 8, 9, 10, 11]


def test_other_sets_have_the_training_classes(folder: Path, tmp_path: Path) -> None:
    """Fails if a test folder with fewer classes counts its own from 0."""
    pictures.write(tmp_path / "test", each=1)
    for path in (tmp_path / "test" / "ant").iterdir():
        path.unlink()
    (tmp_path / "test" / "ant").rmdir()
    options = DataOptions(data="")
    assert opened(str(tmp_path / "test"), options, pictures.CLASSES).targets == [1, 2]
    (tmp_path / "names.txt").write_text("cat\nbee\nant\n")
    options = DataOptions(data="", class_names=tmp_path / "names.txt")
    assert opened(str(folder / "train"), options).targets == [2] * 4 + [1] * 4 + [0] * 4


@pytest.mark.parametrize("names", [["cat", "airplane"], ["n2", "n1"], ["b10", "a9"], ["10", "01"]])
def test_order_in_which_libraries_agree_is_taken(names: list[str]) -> None:
    """Fails if longer names are taken for later ones, or all numbers for unclear."""
    data = Pictures("here", names, names, lambda i: None)
    assert data.classes == sorted(names)


@pytest.mark.parametrize("names", [["n10", "n9"], ["Zebra", "ant"]])
def test_order_in_which_they_differ_is_refused(names: list[str]) -> None:
    """Fails if one library's order is guessed."""
    with pytest.raises(ValueError, match="name the classes in the head's order"):
        Pictures("here", names, names, lambda i: None)


def test_torchvision(tmp_path: Path) -> None:
    """Fails if torchvision's CIFAR-10 is read otherwise than torchvision reads it."""
    import hashlib

    import torchvision

    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    drawn = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = {
        name: {"data": drawn.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [3, 1, 0, 9]}
        for name in names
    }
    batches["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    sums = {}
    for name, batch in batches.items():
        (root / name).write_bytes(pickle.dumps(batch))
        sums[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR10
    with pytest.MonkeyPatch.context() as patch:  # the sums of the real files
        patch.setattr(kind, "train_list", [[name, sums[name]] for name in names[:5]])
        patch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
        meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
        patch.setattr(kind, "meta", meta)
        options = DataOptions(data="", root=tmp_path)
        data = opened("torchvision:CIFAR10", options)
        truth = kind(str(tmp_path), train=True)
        assert [content(data)[i] for i in range(20)] == [
            (np.asarray(picture).tobytes(), label) for picture, label in truth
        ]
        assert data.classes == truth.classes
        assert len(opened("torchvision:CIFAR10:test", options)) == 4
