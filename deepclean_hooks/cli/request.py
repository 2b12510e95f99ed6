"""What the commands have in common: a model and its sets, read and tried before any pass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from deepclean_hooks.cli.datasets import DataOptions, Pictures, opened
from deepclean_hooks.cli.models import Loaded, ModelOptions, load, require_head
from deepclean_hooks.cli.preprocessing import PreprocessingOptions
from deepclean_hooks.cli.what import WhatOptions, chosen
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.named import named


@dataclass(frozen=True, kw_only=True)
class SourceOptions(DataOptions, PreprocessingOptions, ModelOptions):
    """A model and the data that it was trained on."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions(WhatOptions, SourceOptions):
    """What to forget of them, and by which other data that is judged."""

    test: Annotated[str | None, "test data, as --data, to be scored on"] = None
    held_out: Annotated[
        str | None, "data, as --data, that are neither training nor test data, for methods that ask"
    ] = None
    gold: Annotated[
        list[Path], "weights of the same model retrained without the forget set, to compare with"
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a method trains."""

    epochs: Annotated[int, "over the data that stay", 1] = 3
    steps: Annotated[int | None, "of the optimizer, instead of epochs", 1] = None
    optimizer: Annotated[str, "adam, or sgd with momentum 0.9"] = "adam"
    lr: Annotated[float, "the learning rate, which falls to 0", 0] = 1e-3
    seed: Annotated[int, "of the order of the samples, and of dropout", 0] = 0

    def training(self) -> dict[str, Any]:
        """The arguments of `unlearn`; raises ValueError for an unknown optimizer."""
        known: dict[str, Any] = {
            "adam": partial(torch.optim.Adam, lr=self.lr),
            "sgd": partial(torch.optim.SGD, lr=self.lr, momentum=0.9),
        }
        if self.optimizer not in known:
            raise ValueError(f"--optimizer is one of {', '.join(known)}, got {self.optimizer!r}")
        made = known[self.optimizer]
        return {"epochs": self.epochs, "steps": self.steps, "seed": self.seed, "optimizer": made}


METHOD = "as in Python: SSD(alpha=5), NegGradPlus(train=DeepClean(gamma=1.1))"


@dataclass(frozen=True)
class Request:
    """The model, the whole training data, and the sets by name: forget and retain if it was said
    what to forget, test and held_out where given; `gone`: the names of the forget samples."""

    loaded: Loaded
    data: Pictures
    sets: Mapping[str, Any]
    gone: list[str]
    golds: list[nn.Module]

    def method(self, text: str) -> Method:
        """The method that a text names, with what the data say."""
        provided: dict[str, Any] = {n: s for n, s in self.sets.items() if n == "held_out"}
        if self.data.classes is not None:
            provided["classes"] = len(self.data.classes)
        return named(text, provided)


def source(given: SourceOptions) -> Request:
    """The model and its training data, tried on a sample; raises ValueError for what does not
    fit."""
    data = opened(given.data, given)
    return _tried(given, load(given, given, _head(data)), data, {}, [])


def asked(given: RequestOptions) -> Request:
    """The same with what to forget and the other sets."""
    data = opened(given.data, given)
    gone, rest = chosen(data, given)
    loaded = load(given, given, _head(data))
    sets: dict[str, Any] = {"forget": gone, "retain": rest}
    for name in ("test", "held_out"):
        if (spec := getattr(given, name)) is not None:
            sets[name] = opened(spec, given, data.classes)
            sets[name].transform = loaded.transform
    return _tried(given, loaded, data, sets, [data.names[i] for i in gone.indices])


def _head(data: Pictures) -> int:
    """How many classes the head should have."""
    return max(data.targets) + 1 if data.classes is None else len(data.classes)


def _tried(
    given: SourceOptions, loaded: Loaded, data: Pictures, sets: dict[str, Any], gone: list[str]
) -> Request:
    data.transform = loaded.transform
    count = None if data.classes is None else len(data.classes)
    every = [data, *(each for each in sets.values() if isinstance(each, Pictures))]
    require_head(loaded, data[0][0], max(max(each.targets) for each in every), count)
    golds = [loaded.like(path) for path in getattr(given, "gold", [])]
    say(f"preprocessing: {loaded.preprocessing}")
    say(f"data: {len(data)} samples of {data.where}, {len(gone)} of them to forget")
    return Request(loaded, data, {n: read(s, given) for n, s in sets.items()}, gone, golds)


def read(part: Dataset[Any], given: DataOptions) -> Any:
    """The set as it is, or a loader by whose workers its pictures are read."""
    if not given.workers:
        return part
    return DataLoader(part, batch_size=given.batch_size, num_workers=given.workers)


def is_first() -> bool:
    """Whether this process is the one that writes and speaks, before a group is initialised too."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Prints a line once over all processes."""
    if is_first():
        print(line, flush=True)
