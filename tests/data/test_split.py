"""What to forget, by index, file, class or condition: all entries that do not say it are listed."""

import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

import deepclean_hooks as deepclean

CLASSES = ("cat", "cow", "dog")


def folder(root: Path) -> Path:
    """Twelve images in three classes; 0.png is in each of them."""
    from PIL import Image

    for at, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            image = Image.new("RGB", (4, 4), (60 * at, 10 * i, 7))
            image.save(root / name / f"{i if i == 0 else 10 * at + i}.png")
    return root


def image_folder(root: Path) -> object:
    from torchvision.datasets import ImageFolder

    return ImageFolder(folder(root), transform=training)


def timm_folder(root: Path) -> object:
    from timm.data import ImageDataset

    return ImageDataset(str(folder(root)), transform=training)


def training(image: object) -> Tensor:
    """A random transform."""
    return evaluating(image) + torch.rand(1)


def evaluating(image: object) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class Columns:
    """As much of a Hugging Face data set as is used; tests with the library below."""

    class ClassLabel:
        names = CLASSES

    class Value:
        pass

    features: ClassVar = {"image": Value(), "label": ClassLabel(), "subject": Value()}
    column_names: ClassVar = list(features)

    def __init__(self, transform: object = None) -> None:
        self.held = {
            "image": [torch.full((2,), float(i)) for i in range(12)],
            "label": [i // 4 for i in range(12)],
            "subject": [4711 if i % 3 == 0 else i for i in range(12)],
        }
        self.change = transform

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: object) -> object:
        if isinstance(key, str):
            return self.held[key]
        row = {name: values[key] for name, values in self.held.items()}
        return row if self.change is None else self.change(row)

    def with_format(self, _: object) -> "Columns":
        return Columns()

    def with_transform(self, transform: object) -> "Columns":
        return Columns(transform)


class Plain(Dataset):
    """A data set of the user's own: nothing but a length and samples."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.rand(2), torch.tensor(index // 4)


class Attribute(Plain):
    """As torchvision's SVHN and Flowers name their labels, and with a target transform."""

    def __init__(self) -> None:
        self._labels = np.arange(12) // 4
        self.classes = list(CLASSES)
        self.target_transform = lambda label: 2 - label

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(2), self.target_transform(int(self._labels[index]))


def tensors(_: Path) -> object:
    return TensorDataset(torch.randn(12, 2), torch.arange(12) // 4)


SETS = {
    "ImageFolder": image_folder,
    "timm": timm_folder,
    "columns": lambda _: Columns(),
    "plain": lambda _: Plain(),
    "tensors": tensors,
    "subset": lambda root: Subset(image_folder(root), range(12)),
    "joined": lambda root: ConcatDataset(
        [Subset(tensors(root), range(5)), Subset(tensors(root), range(5, 12))]
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_by_class_and_by_index(name: str, tmp_path: Path) -> None:
    """Fails if a kind of data set gives other samples, or one is in both parts or in none."""
    data = SETS[name](tmp_path)
    forget, retain = deepclean.split(data, classes=[1])
    assert forget.indices == [4, 5, 6, 7]
    assert sorted(forget.indices + retain.indices) == list(range(12))
    both, _ = deepclean.split(data, classes=1, indices=[0, np.int64(11)])
    assert both.indices == [0, 4, 5, 6, 7, 11]
    for entries in (torch.tensor([3, 2]), np.array([2, 3]), (3, 2, 3)):
        assert deepclean.split(data, indices=entries)[0].indices == [2, 3]
    mask = np.arange(12) < 2
    assert deepclean.split(data, indices=mask)[0].indices == [0, 1]
    assert deepclean.split(data, indices=torch.from_numpy(mask))[0].indices == [0, 1]


@pytest.mark.parametrize("name", ["ImageFolder", "timm", "columns", "subset"])
def test_by_name_of_the_class(name: str, tmp_path: Path) -> None:
    """Fails if a name stands for another class, or a near name is taken for it."""
    data = SETS[name](tmp_path)
    assert deepclean.split(data, classes="dog")[0].indices == [8, 9, 10, 11]
    with pytest.raises(ValueError, match=r"2 entries .*'cta' \(not among 3; close are \['cat'\]\)"):
        deepclean.split(data, classes=["cta", "cow", 7])
    with pytest.raises(ValueError, match=r"class 7 \(no sample has it\).*none was guessed"):
        deepclean.split(data, classes=["cta", "cow", 7])


def test_a_target_transform_counts() -> None:
    """Fails if a name or an index means the label from before the transform that the model never
    sees."""
    data = Attribute()
    assert deepclean.split(data, classes="cat")[0].indices == [0, 1, 2, 3]
    assert deepclean.split(data, classes=2)[0].indices == [0, 1, 2, 3]


def test_a_name_of_two_classes_is_ambiguous() -> None:
    """Fails if one of two classes that share a name is chosen: ImageNet has two cranes."""
    data = TensorDataset(torch.zeros(6, 2), torch.arange(6) % 3)
    data.classes = [("crane",), ("crane", "bird"), ("dog",)]
    with pytest.raises(ValueError, match=r"'crane' \(the name of the classes \[0, 1\]\)"):
        deepclean.split(data, classes=["crane"])
    assert deepclean.split(data, classes=["bird"])[0].indices == [1, 4]


@pytest.mark.parametrize("name", ["ImageFolder", "timm", "subset"])
def test_by_file(name: str, tmp_path: Path) -> None:
    """Fails if a file name that several samples have names one of them, or an unknown one none."""
    data = SETS[name](tmp_path)
    files = ["cat/0.png", tmp_path / "dog" / "21.png", "12.png"]
    assert deepclean.split(data, indices=files)[0].indices == [0, 6, 9]
    with pytest.raises(ValueError, match="4 entries do not say") as caught:
        deepclean.split(data, indices=["0.png", "elk/0.png", 40, 2.5, "12.png"])
    for text in (
        "file '0.png' (3 samples: ",
        "'elk/0.png' (no sample is read from it)",
        "index 40 (there are 0 to 11)",
        "2.5 (no index and no file)",
    ):
        assert text in str(caught.value)
    with pytest.raises(TypeError, match="does not say from which files"):
        deepclean.split(Plain(), indices=["0.png"])


def test_by_condition() -> None:
    """Fails if a column's value is compared as text, or an unknown column or value is dropped."""
    forget, retain = deepclean.split(Columns(), where={"subject": 4711})
    assert forget.indices == [0, 3, 6, 9]
    assert deepclean.split(Columns(), where={"subject": 4711, "label": 0})[0].indices == [0, 3]
    assert deepclean.split(Columns(), where={"subject": [1, 2]})[0].indices == [1, 2]
    assert len(retain) == 8
    with pytest.raises(ValueError, match=r"subject='4711' \(no sample has it; there are \['1'"):
        deepclean.split(Columns(), where={"subject": "4711"})
    with pytest.raises(ValueError, match=r"column 'subjekt' \(not among 3; close are \['subject'"):
        deepclean.split(Columns(), where={"subjekt": 1})
    with pytest.raises(TypeError, match="asks for columns, which Plain does not have"):
        deepclean.split(Plain(), where={"subject": 1})
    before = torch.get_rng_state()
    assert deepclean.split(Plain(), where=lambda s: int(s[1]) == 2)[0].indices == [8, 9, 10, 11]
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="true of no sample"):
        deepclean.split(Plain(), where=lambda s: False)


def test_empty_and_senseless_requests() -> None:
    """Fails if nothing, or everything, is forgotten, or something is that no set can hold."""
    with pytest.raises(ValueError, match="say what to forget: indices=, classes= or where="):
        deepclean.split(Plain())
    with pytest.raises(ValueError, match="0 of 12 samples would be forgotten"):
        deepclean.split(Plain(), indices=[])
    with pytest.raises(ValueError, match="12 of 12 samples would be forgotten"):
        deepclean.split(Plain(), indices=range(12))
    with pytest.raises(ValueError, match="a mask needs 12 entries"):
        deepclean.split(Plain(), indices=[True, False])
    with pytest.raises(ValueError, match=r"index -1 \(there are 0 to 11\)"):
        deepclean.split(Plain(), indices=[-1])
    with pytest.raises(TypeError, match="a data set with a length is needed"):
        deepclean.split(iter([1]), indices=[0])
    rows = TensorDataset(torch.zeros(4, 2), torch.rand(4))
    with pytest.raises(TypeError, match="are no class indices"):
        deepclean.split(rows, classes=[1])


# timm leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["ImageFolder", "timm", "subset"])
def test_measured_without_augmentation_trained_with_it(name: str, tmp_path: Path) -> None:
    """Fails if the evaluation transform reaches the loop, or the training one the measurement."""
    data = SETS[name](tmp_path)
    forget, retain = deepclean.split(data, classes=["cat"], transform=evaluating)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    found = deepclean.fisher_diagonal(model, retain, batch_size=4, progress=False)
    assert found.settings["samples_change"] is False
    assert torch.equal(retain[0][0], retain[0][0])
    assert not torch.equal(retain.training[0][0], retain.training[0][0])
    assert retain.training[3][1] == retain[3][1]
    assert not torch.equal(data[0][0], data[0][0])  # the user's own object is as it was
    report = deepclean.Session(model, deepclean.DeepClean(gamma=1.1), progress=False).measure(
        forget, retain
    )
    assert report.report.retain_samples == 8


def test_a_transform_that_has_no_place_is_refused() -> None:
    """Fails if the evaluation transform is dropped without a word."""
    with pytest.raises(TypeError, match="no attribute transform"):
        deepclean.split(Plain(), indices=[0], transform=evaluating)
    forget, _ = deepclean.split(Columns(), indices=[0], transform=lambda row: {"other": row})
    assert "other" in forget[0]
    assert "label" in forget.training[0]


def test_hugging_face_data_set() -> None:
    """Fails if the library's own objects are read otherwise than their stand-in."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Sequence(datasets.Value("float32")),
            "label": datasets.ClassLabel(names=list(CLASSES)),
            "subject": datasets.Value("int64"),
        }
    )
    rows = {
        "image": [[float(i)] * 4 for i in range(12)],
        "label": [i // 4 for i in range(12)],
        "subject": [4711 if i % 3 == 0 else i for i in range(12)],
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    assert deepclean.split(data, classes=["cow"])[0].indices == [4, 5, 6, 7]
    assert deepclean.split(data, where={"subject": 4711})[0].indices == [0, 3, 6, 9]

    def change(batch: dict[str, list[object]]) -> dict[str, object]:
        return {"x": [torch.tensor(i) for i in batch["image"]], "label": batch["label"]}

    forget, retain = deepclean.split(data, where={"subject": 4711}, transform=change)
    model = nn.Linear(4, 3)
    found = deepclean.fisher_diagonal(model, retain, batch_size=3, progress=False)
    assert found.count == 8
    assert "image" in forget.training[0]
    assert "datasets" in sys.modules
