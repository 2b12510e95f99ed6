"""What to forget, and the rows of a table that say how it went: shared by the examples."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import deepclean_hooks as deepclean
from tables import Row

Data = Dataset[tuple[Tensor, ...]]
COLUMNS = {
    "model": "",
    "retain": ".1f",
    "forget": ".1f",
    "test": ".1f",
    "test of class": ".1f",
    "members": ".1f",
    "selected": ".1f",
    "dead": ".1f",
    "moved": "d",
    "seconds": ".1f",
}
HOW_TO_READ = """\
retain, forget, test, test of class: accuracy in %; members: % of the forget set that a membership
attacker (logistic regression on the entropy of the output) calls training samples. selected, dead:
% of the trainable weights that were reset, and % of these that no training can bring back; moved:
frozen weights that changed, counted bit by bit."""
AGAINST_GOLD = "In brackets: minus the gold model, where 0 is the aim."


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

    def columns(self) -> dict[str, str]:
        """The columns of this scenario's table."""
        return {k: v for k, v in COLUMNS.items() if self.forget_test or k != "test of class"}


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


class Play:
    """The rows of one scenario's table, one model after the other; `show` is called with each."""

    def __init__(
        self,
        scenario: Scenario,
        original: nn.Module,
        batch_size: int,
        show: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self.scenario, self.original, self.batch_size = scenario, original, batch_size
        self.show = show
        self.gold: deepclean.Evaluation | None = None
        self.rows: list[Row] = []

    def row(
        self,
        name: str,
        model: nn.Module,
        seconds: float | None,
        report: deepclean.Report | None = None,
    ) -> None:
        """Judges a model and adds its row."""
        sets = self.scenario.sets()
        scores = deepclean.evaluate(model, **sets, gold=self.gold, batch_size=self.batch_size)
        row = {"model": name, **figures(scores), **selection(report), "seconds": seconds}
        self.rows.append(row)
        self.show(row)

    def set_gold(self, model: nn.Module) -> None:
        """Later rows are compared with this model, which never saw the forget set."""
        sets = self.scenario.sets()
        self.gold = deepclean.evaluate(model, **sets, batch_size=self.batch_size)

    def unlearned(self, method: deepclean.Method, recipe: Recipe) -> deepclean.Report:
        """The rows right after the reset and after fine-tuning W_f; one measurement serves both."""
        model = copy.deepcopy(self.original)
        reading = {"scores": False, "batch_size": self.batch_size}
        run = deepclean.Session(model, method, **reading)
        run.measure(forget=self.scenario.forget, retain=self.scenario.retain)
        run.select()
        run.reset()
        before = sum(run.report.seconds.values())
        self.row("zeroed only", model, before, run.report)
        run.guard()
        recipe(model, self.scenario.retain)
        report = run.finish()
        self.row("DeepClean", model, sum(report.seconds.values()), report)
        return report

    def fine_tuned(self, recipe: Recipe) -> None:
        """The row of plain fine-tuning: the same recipe, every weight free."""
        model = copy.deepcopy(self.original)
        with stopwatch() as seconds:
            recipe(model, self.scenario.retain)
        self.row("fine-tune", model, seconds[0])


def figures(scores: deepclean.Evaluation) -> dict[str, float | None]:
    """The accuracies and the membership rate of a row, with their gaps to gold."""
    names = {"test of class": "forget_test.accuracy", "members": "membership.rate"}
    names |= {name: f"{name}.accuracy" for name in ("retain", "forget", "test")}
    row: dict[str, float | None] = {}
    for column, name in names.items():
        row[column] = scores.figures().get(name)
        row[f"{column}_gap"] = scores.gaps.get(name)
    return row


def selection(report: deepclean.Report | None) -> dict[str, float | None]:
    """What was reset, in per cent."""
    if report is None or report.selected_fraction is None:
        return {}
    dead = report.dead_fraction
    return {
        "selected": 100 * report.selected_fraction,
        "dead": None if dead is None else 100 * dead,
        "moved": report.frozen_entries_moved,
    }
