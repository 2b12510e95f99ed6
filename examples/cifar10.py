"""CIFAR-10 as tensors, and the ResNets of He et al. for it, for the examples and benchmarks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# ImageNet's, which the public ResNet-20 and ResNet-44 checkpoints were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cifar10(data_dir: Path, *, limit: int | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images (N, 3, 32, 32), normalised, with labels; the first `limit` of each
    if given.

    `data_dir` holds a module `load.py` with a function cifar10(split), or is where torchvision
    keeps or puts its download.
    """
    if (data_dir / "load.py").exists():
        train, test = (_from_module(data_dir / "load.py", split) for split in ("train", "test"))
    else:
        train, test = (_from_torchvision(data_dir, split == "train") for split in ("train", "test"))
    return _normalised(*train, limit), _normalised(*test, limit)


def _from_module(path: Path, split: str) -> tuple[Tensor, Tensor]:
    spec = importlib.util.spec_from_file_location("cifar10_files", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images, labels = module.cifar10(split)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _from_torchvision(data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(data_dir), train=train, download=True)
    return torch.from_numpy(data.data), torch.tensor(data.targets)


def _normalised(images: Tensor, labels: Tensor, limit: int | None) -> TensorDataset:
    images, labels = images[:limit], labels[:limit].long()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return TensorDataset((images.permute(0, 3, 1, 2).float() / 255 - mean) / std, labels)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters: every other pixel, new channels
    0."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.added // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + shortcut)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2 (He et al. 2016, section 4.2); 269,722 parameters at depth
    20."""

    def __init__(self, depth: int = 20, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for index, width in enumerate(widths, 1):
            blocks = []
            for position in range((depth - 2) // 6):
                blocks.append(Block(inputs, width, 2 if index > 1 and position == 0 else 1))
                inputs = width
            setattr(self, f"layer{index}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(checkpoint: Path | None = None) -> ResNet:
    """ResNet-20, with the weights of a checkpoint file if one is given."""
    model = ResNet(20)
    if checkpoint is not None:
        model.load_state_dict(weights(checkpoint))
    return model


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint file, that of a model under DataParallel too."""
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = stored.get("state_dict", stored)
    return {name.removeprefix("module."): value for name, value in state.items()}
