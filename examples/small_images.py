"""Images for the examples that train on more than one process: CIFAR-10, or digits that need no
download."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from cifar10 import cifar10


def images(data_dir: Path | None, limit: int | None) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images (N, 3, S, S) with labels: CIFAR-10 (S = 32) of a folder, or, without
    one, scikit-learn's handwritten digits (S = 8)."""
    return _digits(limit) if data_dir is None else cifar10(data_dir, limit=limit)


def _digits(limit: int | None) -> tuple[TensorDataset, TensorDataset]:
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # (N, 1, 8, 8)
    x, y = x.repeat(1, 3, 1, 1), torch.tensor(labels, dtype=torch.int64)
    cut = len(y) * 3 // 4
    train, test = slice(0, cut), slice(cut, None)
    return TensorDataset(x[train][:limit], y[train][:limit]), TensorDataset(x[test], y[test])


def without_class(data: TensorDataset, label: int) -> tuple[TensorDataset, TensorDataset]:
    """(the samples of the class, all others)."""
    is_class = data.tensors[1] == label
    return (
        TensorDataset(*(tensor[is_class] for tensor in data.tensors)),
        TensorDataset(*(tensor[~is_class] for tensor in data.tensors)),
    )
