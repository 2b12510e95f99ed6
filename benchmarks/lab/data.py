"""The data sets of the tables as tensors: training and test images with labels, normalised."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

Raw = tuple[Tensor, Tensor]
"""uint8 images (N, H, W) or (N, H, W, 3), and labels (N,)."""


@dataclass(frozen=True)
class Kind:
    """What is known of a data set before it is read; `margin`: pixels that a random crop shifts by,
    `flip`: whether a mirrored image still is of its class."""

    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    margin: int
    flip: bool


# CIFAR: ImageNet's mean and deviation, which the public ResNet-20 checkpoint was trained with.
_COLOUR = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
KINDS = {
    "mnist": Kind(10, 1, 28, (0.1307,), (0.3081,), margin=2, flip=False),
    "cifar10": Kind(10, 3, 32, **_COLOUR, margin=4, flip=True),
    "cifar100": Kind(100, 3, 32, **_COLOUR, margin=4, flip=True),
    "tinyimagenet32": Kind(200, 3, 32, **_COLOUR, margin=4, flip=True),
    "digits": Kind(10, 1, 8, (0.3,), (0.38,), margin=0, flip=False),
}


@dataclass(frozen=True)
class Images:
    """Training and test images (N, C, S, S) in float32, with labels."""

    kind: Kind
    train: TensorDataset
    test: TensorDataset

    def to(self, device: str) -> Images:
        """The same on a device."""
        train, test = (
            TensorDataset(*(t.to(device) for t in one.tensors)) for one in (self.train, self.test)
        )
        return Images(self.kind, train, test)


def images(
    name: str, data_dir: Path | None, *, train: int | None = None, test: int | None = None
) -> Images:
    """The data set, or the first `train` and `test` images of it.

    `data_dir` holds a module `load.py` with a function of the data set's name, or is where
    torchvision keeps or puts its download; "digits" (scikit-learn's, 8 x 8) needs none.
    """
    if name not in KINDS:
        raise ValueError(f"data must be one of {', '.join(KINDS)}, got {name!r}")
    if name != "digits" and data_dir is None:
        raise ValueError(
            f"{name} needs a folder: pass --data-dir, or --data digits, which has none"
        )
    kind, read = KINDS[name], _reader(name, data_dir)
    sets = (
        _normalised(*_first(*read(True), train), kind),
        _normalised(*_first(*read(False), test), kind),
    )
    return Images(kind, *sets)


def _first(pixels: Tensor, labels: Tensor, count: int | None) -> Raw:
    """The first images; of sets that are ordered by class, evenly spaced ones."""
    if count is None or count >= len(labels):
        return pixels, labels
    if bool((labels.diff() >= 0).all()):
        chosen = torch.linspace(0, len(labels) - 1, count).long()
        return pixels[chosen], labels[chosen]
    return pixels[:count], labels[:count]


def _normalised(pixels: Tensor, labels: Tensor, kind: Kind) -> TensorDataset:
    scaled = pixels.float() / 255
    scaled = scaled.unsqueeze(1) if scaled.dim() == 3 else scaled.permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (kind.mean, kind.std))
    return TensorDataset(((scaled - mean) / std).contiguous(), labels.long())


def _reader(name: str, data_dir: Path | None) -> Callable[[bool], Raw]:
    if data_dir is None:
        return _digits
    module = data_dir / "load.py"
    if module.exists():
        return lambda train: _from_module(module, name, train)
    return lambda train: _from_torchvision(data_dir, name, train)


def _from_module(path: Path, name: str, train: bool) -> Raw:
    spec = importlib.util.spec_from_file_location("image_files", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"{path.name} of the data folder has no function {name}(split)")
    held_out = "val" if name == "tinyimagenet32" else "test"
    pixels, labels = getattr(module, name)("train" if train else held_out)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def _from_torchvision(data_dir: Path, name: str, train: bool) -> Raw:
    import torchvision.datasets as known

    makers = {"mnist": known.MNIST, "cifar10": known.CIFAR10, "cifar100": known.CIFAR100}
    if name not in makers:
        raise ValueError(f"torchvision cannot download {name}; pass a --data-dir with load.py")
    data = makers[name](str(data_dir), train=train, download=True)
    return torch.as_tensor(data.data), torch.as_tensor(data.targets)


def _digits(train: bool) -> Raw:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    cut = 2 * len(labels) // 3
    part = slice(0, cut) if train else slice(cut, None)
    scaled = torch.tensor(pixels).view(-1, 8, 8) * (255 / 16)
    return scaled.round().to(torch.uint8)[part], torch.tensor(labels)[part]
