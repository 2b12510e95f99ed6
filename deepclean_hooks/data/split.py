"""What to forget, and what to keep, of one data set: by indices or files, classes, or a condition.

Every entry that names no sample, or more than what it can mean, is listed; nothing is guessed.
"""

from __future__ import annotations

import copy
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from deepclean_hooks.data import labels
from deepclean_hooks.model import random_state

Condition = Callable[[Any], bool] | Mapping[str, Any]
_SHOWN = 10


class Part(Subset[Any]):
    """Some samples of a data set, under the evaluation transform if one was given; `training` has
    the same samples under the data set's transform, for the loop."""

    def __init__(self, dataset: Any, indices: list[int], training: Any) -> None:
        super().__init__(dataset, indices)
        self.training: Subset[Any] = Subset(training, indices)


def split(
    dataset: Dataset[Any],
    *,
    indices: Any = None,
    classes: str | int | Iterable[str | int] | None = None,
    where: Condition | None = None,
    transform: Callable[..., Any] | None = None,
) -> tuple[Part, Part]:
    """(forget, retain): the samples that any of the three names, and the rest.

    `indices`: positions, a mask with a bool for each sample, or files (as much of the end of the
    path as names a single sample); `classes`: names or class indices; `where`: a function of a
    sample, or column -> value, or several values, of a Hugging Face data set. `transform`: the
    evaluation transform, under which both parts are measured; `retain.training` keeps the data
    set's.

    Raises ValueError with every entry that is unknown or ambiguous, and if a part would be empty;
    TypeError for a data set that does not know what it is asked for.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"a data set with a length is needed, got {type(dataset).__name__}; a DataLoader has "
            "one as its attribute dataset"
        )
    if indices is None and classes is None and where is None:
        raise ValueError("say what to forget: indices=, classes= or where=")
    chosen: set[int] = set()
    problems: list[str] = []
    if indices is not None:
        chosen |= _by_indices(dataset, indices, problems)
    if classes is not None:
        chosen |= _by_classes(dataset, classes, problems)
    if where is not None:
        chosen |= _by_condition(dataset, where, problems)
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{len(problems)} entries do not say what to forget: {'; '.join(problems[:_SHOWN])}"
            f"{more}; correct them, none was guessed"
        )
    count = len(dataset)
    if not 0 < len(chosen) < count:
        raise ValueError(
            f"{len(chosen)} of {count} samples would be forgotten, so the "
            f"{'retain' if chosen else 'forget'} set would be empty; name some samples, not all"
        )
    measured = dataset if transform is None else _transformed(dataset, transform)
    rest = [i for i in range(count) if i not in chosen]
    return Part(measured, sorted(chosen), dataset), Part(measured, rest, dataset)


def _by_indices(dataset: Any, entries: Any, problems: list[str]) -> set[int]:
    if isinstance(entries, Tensor):
        entries = entries.cpu().numpy()
    if isinstance(entries, str | PurePath | int):
        entries = [entries]
    entries = list(entries)
    count = len(dataset)
    if entries and all(isinstance(entry, bool | np.bool_) for entry in entries):
        if len(entries) != count:
            raise ValueError(
                f"a mask needs {count} entries, one for each sample, got {len(entries)}"
            )
        return {i for i, entry in enumerate(entries) if entry}
    chosen: set[int] = set()
    named: list[PurePath] = []
    for entry in entries:
        if isinstance(entry, str | PurePath):
            named.append(PurePath(entry))
        elif isinstance(entry, bool) or not isinstance(entry, int | np.integer):
            problems.append(f"{entry!r} (no index and no file)")
        elif not 0 <= entry < count:
            problems.append(f"index {entry} (there are 0 to {count - 1})")
        else:
            chosen.add(int(entry))
    return chosen | _by_files(dataset, named, problems) if named else chosen


def found_by_files(dataset: Any, named: list[PurePath]) -> list[list[int]] | None:
    """For each path the samples whose files end in it; None where files are not known."""
    known = labels.files(dataset)
    if known is None:
        return None
    wanted: dict[tuple[str, ...], list[int]] = {path.parts: [] for path in named}
    lengths = {len(parts) for parts in wanted}
    for index, path in enumerate(known):
        for length in lengths:
            if path.parts[-length:] in wanted:
                wanted[path.parts[-length:]].append(index)
    return [wanted[path.parts] for path in named]


def _by_files(dataset: Any, named: list[PurePath], problems: list[str]) -> set[int]:
    places, known = found_by_files(dataset, named), labels.files(dataset)
    if places is None or known is None:
        raise TypeError(
            f"{type(dataset).__name__} does not say from which files its samples are read; name "
            "the samples by their indices"
        )
    chosen: set[int] = set()
    for path, positions in zip(named, places, strict=True):
        if len(positions) == 1:
            chosen.add(positions[0])
        elif positions:
            examples = ", ".join(str(known[i]) for i in positions[:2])
            problems.append(f"file {str(path)!r} ({len(positions)} samples: {examples})")
        else:
            problems.append(f"file {str(path)!r} (no sample is read from it)")
    return chosen


def _by_classes(dataset: Any, entries: Any, problems: list[str]) -> set[int]:
    if isinstance(entries, str | int | np.integer):
        entries = [entries]
    names = labels.names(dataset)
    of_samples = labels.of_dataset(dataset)
    present = set(of_samples)
    wanted: set[int] = set()
    for entry in entries:
        if isinstance(entry, str):
            called = names.get(entry, [])
            if len(called) > 1:
                problems.append(f"class {entry!r} (the name of the classes {called})")
            elif not called:
                problems.append(f"class {entry!r} ({_close(entry, names)})")
            elif called[0] not in present:
                problems.append(f"class {entry!r} (no sample has it)")
            wanted.update(called)
        elif isinstance(entry, bool) or not isinstance(entry, int | np.integer):
            problems.append(f"class {entry!r} (neither a name nor a class index)")
        elif int(entry) not in present:
            problems.append(f"class {int(entry)} (no sample has it)")
        else:
            wanted.add(int(entry))
    return {i for i, label in enumerate(of_samples) if label in wanted}


def _by_condition(dataset: Any, condition: Condition, problems: list[str]) -> set[int]:
    if callable(condition):
        with random_state.kept():
            chosen = {i for i in range(len(dataset)) if condition(dataset[i])}
        if not chosen:
            problems.append("where= (true of no sample)")
        return chosen
    if not hasattr(dataset, "column_names"):
        raise TypeError(
            f"where={condition!r} asks for columns, which {type(dataset).__name__} does not have; "
            "pass a function of a sample, such as where=lambda sample: sample[1] == 3"
        )
    chosen = set(range(len(dataset)))
    for name, value in condition.items():
        if name not in dataset.column_names:
            problems.append(f"column {name!r} ({_close(name, dataset.column_names)})")
            continue
        held = labels.column(dataset, name)
        values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
        for each in values:
            if each not in held:
                kinds = sorted(set(map(repr, held[:1000])))[:3]
                problems.append(f"{name}={each!r} (no sample has it; there are {kinds})")
        chosen &= {i for i, entry in enumerate(held) if entry in values}
    if not chosen and not problems:
        problems.append(f"where={dict(condition)!r} (true of no sample)")
    return chosen


def _close(entry: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(entry, known, n=3)
    if close:
        return f"not among {len(known)}; close are {close}"
    return f"not among {len(known)}, for instance {known[:3]}" if known else "there are no names"


def _transformed(dataset: Any, transform: Callable[..., Any]) -> Any:
    """A copy of the data set with this transform; the user's object keeps its transform."""
    if isinstance(dataset, Subset):
        return Subset(_transformed(dataset.dataset, transform), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([_transformed(part, transform) for part in dataset.datasets])
    if labels.has_columns(dataset):
        return dataset.with_transform(transform)
    if not hasattr(dataset, "transform"):
        raise TypeError(
            f"{type(dataset).__name__} has no attribute transform to put the evaluation transform "
            "in; leave transform= out and pass a data set that has it already"
        )
    changed = copy.copy(dataset)
    changed.transform = transform
    if hasattr(dataset, "transforms"):  # torchvision keeps both transforms in one object
        standard = sys.modules["torchvision.datasets.vision"].StandardTransform
        if dataset.transforms is not None and type(dataset.transforms) is not standard:
            raise TypeError(
                f"{type(dataset).__name__} transforms images and labels together; leave transform= "
                "out and pass a data set that has the evaluation transform already"
            )
        changed.transforms = standard(transform, dataset.target_transform)
    return changed
