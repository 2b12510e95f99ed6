"""Forget a class, then random samples, from a small network on scikit-learn's bundled digits.

    python examples/forget_digits.py

Needs no network and no GPU. Trains the model, and for each scenario a gold model that never saw the
forgotten samples; compares both with the model right after the reset, with DeepClean, and with plain
fine-tuning under the same recipe.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import deepclean_hooks as deepclean
from tables import Row, table

SEED = 0
BATCH = 64
# The paper does not state its batch size. At 64 its 3 epochs would be 57 steps of this data, where
# CIFAR-10 gives 1,000 and more; at 16 they are about 230.
TUNE_BATCH = 16
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
attacker (logistic regression on the entropy of the output) calls training samples; in brackets: minus
the gold model, where 0 is the aim. selected, dead: % of the trainable weights that were reset, and of
these the % that no training can bring back; moved: frozen weights that changed, counted bit by bit."""


class DigitsNet(nn.Sequential):
    """A convolutional network for 8 x 8 images with BatchNorm, 24,058 parameters."""

    def __init__(self) -> None:
        super().__init__(
            *self.block(1, 16),
            *self.block(16, 32),
            nn.MaxPool2d(2),
            *self.block(32, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    @staticmethod
    def block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


@dataclass(frozen=True)
class Scenario:
    """What to forget, and the sets to judge that by; `forget_test` is the test data of the class."""

    title: str
    gamma: float
    forget: Dataset[tuple[Tensor, ...]]
    retain: Dataset[tuple[Tensor, ...]]
    test: Dataset[tuple[Tensor, ...]]
    forget_test: Dataset[tuple[Tensor, ...]] | None = None


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,347 training and 450 test images, each class in proportion."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # (N, 1, 8, 8), 0 to 1
    y = torch.tensor(labels, dtype=torch.int64)  # (N,)
    train, test = train_test_split(
        torch.arange(len(y)), test_size=0.25, random_state=SEED, stratify=y
    )
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def class_scenario(train: TensorDataset, test: TensorDataset, label: int) -> Scenario:
    is_class, in_test = train.tensors[1] == label, test.tensors[1] == label
    return Scenario(
        f"forget class {label} (gamma 2)",
        2.0,
        Subset(train, is_class.nonzero().flatten().tolist()),
        Subset(train, (~is_class).nonzero().flatten().tolist()),
        Subset(test, (~in_test).nonzero().flatten().tolist()),
        Subset(test, in_test.nonzero().flatten().tolist()),
    )


def random_scenario(train: TensorDataset, test: TensorDataset, share: float) -> Scenario:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED)).tolist()
    cut = round(share * len(order))
    title = f"forget {share:.0%} of the training samples at random (gamma 1.1)"
    return Scenario(title, 1.1, Subset(train, order[:cut]), Subset(train, order[cut:]), test)


def loader(
    data: Dataset[tuple[Tensor, ...]], batch_size: int = BATCH
) -> DataLoader[tuple[Tensor, ...]]:
    order = torch.Generator().manual_seed(SEED)
    return DataLoader(data, batch_size=batch_size, shuffle=True, generator=order)


def train_from_scratch(data: Dataset[tuple[Tensor, ...]], epochs: int) -> nn.Module:
    torch.manual_seed(SEED)
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    fit(model, loader(data), optimizer, epochs)
    return model


def fine_tune(model: nn.Module, data: Dataset[tuple[Tensor, ...]], epochs: int) -> None:
    """The paper's recipe, as anyone would write it: nothing in here knows of unlearning."""
    fit(model, loader(data, TUNE_BATCH), torch.optim.Adam(model.parameters(), lr=1e-3), epochs)


def fit(
    model: nn.Module,
    batches: DataLoader[tuple[Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> None:
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


def play(
    scenario: Scenario, original: nn.Module, spent: float, epochs: int, tune: int
) -> list[Row]:
    """The rows of a scenario's table; the original took `spent` seconds to train."""
    sets = {"forget": scenario.forget, "retain": scenario.retain, "test": scenario.test}
    if scenario.forget_test is not None:
        sets["forget_test"] = scenario.forget_test
    with stopwatch() as gold_seconds:
        gold_model = train_from_scratch(scenario.retain, epochs)
    gold = deepclean.evaluate(gold_model, **sets, batch_size=BATCH)

    def row(
        name: str, model: nn.Module, seconds: float, report: deepclean.Report | None = None
    ) -> Row:
        scores = deepclean.evaluate(model, **sets, gold=gold, batch_size=BATCH)
        return {"model": name, **figures(scores), **selection(report), "seconds": seconds}

    rows = [row("original", original, spent), row("gold", gold_model, gold_seconds[0])]
    method = deepclean.DeepClean(gamma=scenario.gamma)

    model = copy.deepcopy(original)
    run = deepclean.Session(model, method, scores=False)
    run.measure(forget=loader(scenario.forget), retain=loader(scenario.retain))
    run.select()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run with fine-tuning, below, says the same again
        run.reset()
    rows.append(row("zeroed only", model, sum(run.report.seconds.values()), run.report))

    model = copy.deepcopy(original)
    with deepclean.unlearning(
        model,
        forget=loader(scenario.forget),
        retain=loader(scenario.retain),
        method=method,
        scores=False,
    ) as run:
        fine_tune(model, scenario.retain, tune)
    rows.append(row("DeepClean", model, sum(run.report.seconds.values()), run.report))

    model = copy.deepcopy(original)
    with stopwatch() as seconds:
        fine_tune(model, scenario.retain, tune)
    rows.append(row("fine-tune", model, seconds[0]))
    return rows


def figures(scores: deepclean.Evaluation) -> dict[str, float | None]:
    names = {"test of class": "forget_test.accuracy", "members": "membership.rate"}
    names |= {name: f"{name}.accuracy" for name in ("retain", "forget", "test")}
    row: dict[str, float | None] = {}
    for column, name in names.items():
        row[column] = scores.figures().get(name)
        row[f"{column}_gap"] = scores.gaps.get(name)
    return row


def selection(report: deepclean.Report | None) -> dict[str, float | None]:
    if report is None or report.selected_fraction is None:
        return {}
    dead = report.dead_fraction
    return {
        "selected": 100 * report.selected_fraction,
        "dead": None if dead is None else 100 * dead,
        "moved": report.frozen_entries_moved,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15, help="to train a model (default: 15)")
    parser.add_argument("--tune", type=int, default=3, help="epochs of fine-tuning (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args()

    # Layers this small are slower on several threads, and sums would depend on their number.
    torch.set_num_threads(1)
    train, test = digits()
    train_from_scratch(test, epochs=1)  # what torch does on first use is nobody's training time
    with stopwatch() as spent:
        original = train_from_scratch(train, options.epochs)
    print(
        f"{len(train)} training and {len(test)} test images, 8 x 8, 10 classes; one seed ({SEED})"
    )
    written = {}
    for scenario in (class_scenario(train, test, 0), random_scenario(train, test, 0.1)):
        rows = play(scenario, original, spent[0], options.epochs, options.tune)
        shown = dict(COLUMNS)
        if scenario.forget_test is None:
            del shown["test of class"]
        print(f"\n{scenario.title}\n{table(rows, shown)}")
        written[scenario.title] = rows
    print(f"\n{HOW_TO_READ}")
    if options.json:
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
