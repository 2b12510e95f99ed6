"""What one table is made of, and the scales: `setup("small", "cifar10", ...)`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import TensorDataset

from benchmarks.lab.data import KINDS, Images, images

from .recipes import PAPER, Recipe, fast

FORGOTTEN_CLASS = 0  # the paper's
SHARES = {"random": 0.1, "percent": 0.01}  # of the training samples, forgotten at random
FIFTY = ("fifty-0", "fifty-1", "fifty-2", "fifty-3")  # quarters of the forget set of "percent"
SCENARIOS = ("class", *SHARES, *FIFTY)  # "class-3" is "class" with another label


def forgotten_class(scenario: str) -> int | None:
    """The label that a scenario forgets; None for random samples."""
    if scenario in (*SHARES, *FIFTY):
        return None
    kind, dash, label = scenario.partition("-")
    if kind == "class" and (not dash or label.isdigit()):
        return int(label or FORGOTTEN_CLASS)
    known = ", ".join(SCENARIOS)
    raise ValueError(f"scenario must be one of {known} or class-LABEL, got {scenario!r}")


@dataclass(frozen=True)
class Setup:
    """A data set, a network and a recipe, and where what is trained and measured is kept.

    `train_images`, `test_images`: the first so many (None: all). `fine_tune_epochs`,
    `fine_tune_batch`: what every method that trains is given. `checkpoint`: the weights of the
    original, which is trained where there are none; without its training no gold can be made.
    """

    scale: str
    data: str
    network: str
    recipe: Recipe
    fine_tune_epochs: int
    fine_tune_batch: int
    train_images: int | None
    test_images: int | None
    checkpoint: Path | None = None
    data_dir: Path | None = field(default=None, compare=False)
    cache: Path = field(default=Path("build/paper_tables"), compare=False)
    device: str = field(default="cpu", compare=False)

    def settings(self) -> dict[str, Any]:
        """What decides the figures, for the JSON: everything but folders and the device."""
        given = self.checkpoint and {"checkpoint": self._checkpoint, "recipe": None}
        return {
            "scale": self.scale,
            "data": self.data,
            "network": self.network,
            "recipe": self.recipe.settings(),
            "fine_tune_epochs": self.fine_tune_epochs,
            "fine_tune_batch": self.fine_tune_batch,
            "train_images": self.train_images,
            "test_images": self.test_images,
            "forgotten_class": FORGOTTEN_CLASS,
            "random_share": SHARES["random"],
            **(given or {}),
        }

    @cached_property
    def _checkpoint(self) -> dict[str, str]:
        """The checkpoint by its name and its content, whatever folder it lies in."""
        assert self.checkpoint is not None
        content = hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()
        return {"name": self.checkpoint.name, "sha256": content}

    @property
    def folder(self) -> Path:
        """Where this table's files are; another setting has another folder."""
        told = json.dumps(self.settings(), sort_keys=True)
        mark = hashlib.sha256(told.encode()).hexdigest()[:8]
        folder = self.cache / f"{self.scale}_{self.data}_{self.network}_{self.recipe.name}_{mark}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def _read(self) -> Images:
        count = {"train": self.train_images, "test": self.test_images}
        return images(self.data, self.data_dir, **count).to(self.device)

    @cached_property
    def images(self) -> Images:
        """The data on the device, read when first asked for; of the saturated setting without the
        held-out half of the test images, and with mirror images as the only augmentation."""
        if self.scale != "saturated":
            return self._read
        kind = dataclasses.replace(self._read.kind, margin=0)
        return Images(kind, self._read.train, _part(self._read.test, 1))

    @cached_property
    def held_out(self) -> TensorDataset:
        """Data that no network was trained on and that no figure is judged by: every other test
        image of the saturated setting. Raises ValueError for another scale."""
        if self.scale != "saturated":
            raise ValueError(f"the scale {self.scale} keeps no held-out data; use saturated")
        return _part(self._read.test, 0)


def _part(data: TensorDataset, first: int) -> TensorDataset:
    return TensorDataset(*(tensor[first::2] for tensor in data.tensors))


@dataclass(frozen=True)
class _Scale:
    data: str
    network: str
    recipe: str
    train_images: dict[str, int]
    test_images: int | None
    fast_epochs: dict[str, int]


SCALES = {
    "full": _Scale(
        "cifar10", "resnet18", "paper", {}, None,
        {"mnist": 5, "cifar10": 20, "cifar100": 30, "tinyimagenet32": 30, "digits": 10},
    ),
    "small": _Scale(
        "cifar10", "resnet8", "fast", dict.fromkeys(KINDS, 10_000), 5_000,
        {"mnist": 4, "cifar10": 12, "cifar100": 20, "tinyimagenet32": 20, "digits": 10},
    ),
    # Learns its data by heart, as networks in use have; see networks.CONV4.
    "saturated": _Scale(
        "cifar10", "conv4", "fast", dict.fromkeys(KINDS, 20_000), None,
        {"mnist": 15, "cifar10": 15, "cifar100": 30, "tinyimagenet32": 30, "digits": 15},
    ),
    "smoke": _Scale(
        "digits", "resnet8-narrow", "fast", dict.fromkeys(KINDS, 500), 250,
        dict.fromkeys(KINDS, 6),
    ),
}  # fmt: skip


def setup(
    scale: str,
    data: str | None = None,
    network: str | None = None,
    recipe: str | None = None,
    *,
    epochs: int | None = None,
    checkpoint: Path | None = None,
    data_dir: Path | None = None,
    cache: Path = Path("build/paper_tables"),
    device: str = "cpu",
) -> Setup:
    """The setup of a scale ("full", "small", "saturated" or "smoke"), with its own choices where
    none is given."""
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    chosen = SCALES[scale]
    data, kind = data or chosen.data, recipe or chosen.recipe
    if data not in KINDS:
        raise ValueError(f"data must be one of {', '.join(KINDS)}, got {data!r}")
    if kind not in ("paper", "fast"):
        raise ValueError(f"recipe must be paper or fast, got {kind!r}")
    return Setup(
        scale=scale,
        data=data,
        network=network or chosen.network,
        recipe=_recipe(kind, scale, data),
        fine_tune_epochs=epochs or usual_epochs(data),
        fine_tune_batch=128 if scale == "full" else 64,  # not stated in the paper
        train_images=chosen.train_images.get(data),
        test_images=chosen.test_images,
        checkpoint=checkpoint,
        data_dir=data_dir,
        cache=cache,
        device=device,
    )


def usual_epochs(data: str) -> int:
    """What the paper fine-tunes for on a data set."""
    return 1 if data == "mnist" else 3


def _recipe(kind: str, scale: str, data: str) -> Recipe:
    if kind == "paper":
        return PAPER[data]
    own = fast(SCALES[scale].fast_epochs[data])
    return own if scale != "full" else dataclasses.replace(own, batch_size=256, lr=0.4)
