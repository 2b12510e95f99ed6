"""What a data set says of its samples without reading them: labels, names of classes, files.

Understood: torchvision's data sets and ImageFolder, timm's, Hugging Face's `datasets`,
TensorDataset, Subset and ConcatDataset of these; of any other with a length every sample is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from deepclean_hooks.model import random_state

_ATTRIBUTES = ("targets", "labels", "_labels", "_targets")
_COLUMNS = ("labels", "label")


def has_columns(dataset: Any) -> bool:
    """Whether it is a data set of Hugging Face's `datasets`."""
    return hasattr(dataset, "column_names") and hasattr(dataset, "features")


def column(dataset: Any, name: str) -> list[Any]:
    """A column, without the transform that a Hugging Face data set applies to what is read."""
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    return list(plain[name])


def of_dataset(dataset: Any) -> list[int]:
    """The class index of each sample, as the data set gives it; raises TypeError where samples have
    none."""
    if isinstance(dataset, Subset):
        inner = of_dataset(dataset.dataset)
        return [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [label for part in dataset.datasets for label in of_dataset(part)]
    raw = _raw(dataset)
    if raw is None:
        return _read(dataset)
    change = getattr(dataset, "target_transform", None)
    return raw if change is None else [_whole(change(label), dataset) for label in raw]


def names(dataset: Any) -> dict[str, list[int]]:
    """The class indices of each class name: several where a name stands for several classes;
    empty where classes have no names."""
    if isinstance(dataset, Subset):
        return names(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        parts = [names(part) for part in dataset.datasets]
        return parts[0] if all(part == parts[0] for part in parts) else {}
    called: dict[str, set[int]] = {}
    for index, entry in enumerate(_classes(dataset)):
        for name in (entry,) if isinstance(entry, str) else entry:
            called.setdefault(str(name), set()).add(index)
    for holder in (dataset, getattr(dataset, "reader", None)):
        table = getattr(holder, "class_to_idx", None)
        for name, index in table.items() if isinstance(table, Mapping) else ():
            called.setdefault(str(name), set()).add(int(index))
    change = getattr(dataset, "target_transform", None) or (lambda index: index)
    return {name: sorted({int(change(i)) for i in at}) for name, at in called.items()}


def files(dataset: Any) -> list[PurePath] | None:
    """The file of each sample, or None where they are not known."""
    if isinstance(dataset, Subset):
        inner = files(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [files(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return [path for part in known for path in part] if len(known) == len(parts) else None
    pairs = _pairs(dataset)
    return None if pairs is None else [PurePath(path) for path, _ in pairs]


def label_column(dataset: Any) -> str:
    """The column of class labels of a Hugging Face data set; raises TypeError if it is unclear."""
    kinds = {name: type(kind).__name__ for name, kind in dataset.features.items()}
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    candidates = classes or [name for name in kinds if name in _COLUMNS]
    if len(candidates) != 1:
        raise TypeError(
            f"which column holds the classes is not clear: {candidates or sorted(kinds)}; say so, "
            f"such as where={{{(candidates or list(kinds))[0]!r}: value}}"
        )
    return str(candidates[0])


def _raw(dataset: Any) -> list[int] | None:
    """Labels from before a target transform, or None where only reading tells."""
    if has_columns(dataset):
        name = label_column(dataset)
        return [_whole(label, dataset) for label in column(dataset, name)]
    if isinstance(dataset, TensorDataset):
        return _integers(dataset.tensors[-1], len(dataset)) if len(dataset.tensors) == 2 else None
    for name in _ATTRIBUTES:
        labels = _integers(getattr(dataset, name, None), len(dataset))
        if labels is not None:
            return labels
    pairs = _pairs(dataset)
    return None if pairs is None else _integers([label for _, label in pairs], len(dataset))


def _integers(values: Any, count: int) -> list[int] | None:
    """The values as integers, if they are an integer for each sample."""
    if not isinstance(values, Sequence | Tensor | np.ndarray) or len(values) != count:
        return None
    array = np.asarray(values)
    return array.tolist() if array.ndim == 1 and array.dtype.kind in "iu" else None


def _pairs(dataset: Any) -> Sequence[tuple[Any, Any]] | None:
    """(file, label) of each sample: torchvision's folders and timm's readers have such a list."""
    for holder in (dataset, getattr(dataset, "reader", None)):
        for name in ("samples", "imgs"):
            pairs = getattr(holder, name, None)
            if isinstance(pairs, Sequence) and len(pairs) == len(dataset) and _is_pair(pairs[0]):
                return pairs
    return None


def _is_pair(entry: object) -> bool:
    return (
        isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], str | PurePath)
    )


def _classes(dataset: Any) -> Iterable[Any]:
    if has_columns(dataset):
        return getattr(dataset.features[label_column(dataset)], "names", None) or ()
    names = getattr(dataset, "classes", None)
    return names if isinstance(names, list | tuple) else ()


def _read(dataset: Any) -> list[int]:
    with random_state.kept():
        return [_label(dataset[i], dataset) for i in range(len(dataset))]


def _label(sample: Any, dataset: Any) -> int:
    if isinstance(sample, Mapping):
        held = [name for name in _COLUMNS if name in sample]
        if len(held) == 1:
            return _whole(sample[held[0]], dataset)
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        return _whole(sample[1], dataset)
    raise TypeError(
        f"a sample of {type(dataset).__name__} has no label that is clear; name the samples by "
        "indices= or by where=, a function of a sample"
    )


def _whole(value: Any, dataset: Any) -> int:
    if isinstance(value, Tensor | np.ndarray | np.generic) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"the labels of {type(dataset).__name__} are no class indices, for instance "
            f"{value!r}; name the samples by indices= or by where="
        )
    return value
