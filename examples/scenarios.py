"""What to forget, and how a model is fine-tuned: shared by the examples and the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

Data = Dataset[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Scenario:
    """What to forget, and the sets to judge that by; `forget_test` is the test data of the
    class."""

    title: str
    gamma: float
    forget: Data
    retain: Data
    test: Data
    forget_test: Data | None = None

    def sets(self) -> dict[str, Data]:
        """The sets by the names that `evaluate` has for them."""
        sets = {"forget": self.forget, "retain": self.retain, "test": self.test}
        if self.forget_test is not None:
            sets["forget_test"] = self.forget_test
        return sets


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned: the paper's recipe, as anyone would write it."""

    epochs: int
    batch_size: int
    lr: float = 1e-3
    seed: int = 0

    def __call__(self, model: nn.Module, data: Data) -> None:
        """Nothing in here knows of unlearning."""
        batches = loader(data, self.batch_size, self.seed)
        fit(model, batches, torch.optim.Adam(model.parameters(), lr=self.lr), self.epochs)


def class_scenario(train: TensorDataset, test: TensorDataset, label: int, gamma: float) -> Scenario:
    """All training samples of one class; the test set is split likewise."""
    is_class, in_test = train.tensors[1] == label, test.tensors[1] == label
    return Scenario(
        f"forget class {label} (gamma {gamma:g})",
        gamma,
        Subset(train, is_class.nonzero().flatten().tolist()),
        Subset(train, (~is_class).nonzero().flatten().tolist()),
        Subset(test, (~in_test).nonzero().flatten().tolist()),
        Subset(test, in_test.nonzero().flatten().tolist()),
    )


def random_scenario(
    train: TensorDataset, test: TensorDataset, share: float, gamma: float, seed: int = 0
) -> Scenario:
    """A share of the training samples, drawn at random."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round(share * len(order))
    title = f"forget {share:.0%} of the training samples at random (gamma {gamma:g})"
    return Scenario(title, gamma, Subset(train, order[:cut]), Subset(train, order[cut:]), test)


def loader(data: Data, batch_size: int, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Batches in an order drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=batch_size, shuffle=True, generator=generator)


def fit(
    model: nn.Module,
    batches: DataLoader[tuple[Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> None:
    """Cross-entropy, cosine annealing to 0, no augmentation."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Yields a list that holds the seconds of the block once it has ended."""
    spent: list[float] = []
    start = time.perf_counter()
    yield spent
    spent.append(time.perf_counter() - start)
