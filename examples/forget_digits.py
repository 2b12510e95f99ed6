"""Forget a class, then random samples, from a small network on scikit-learn's bundled digits.

    python examples/forget_digits.py

Needs no network and no GPU. Trains the model, and for each scenario a gold model that never saw the
forgotten samples; compares both with the model right after the reset, with DeepClean, and with
plain fine-tuning under the same recipe.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

import deepclean_hooks as deepclean
from play import AGAINST_GOLD, HOW_TO_READ, Play, columns
from scenarios import (
    Data,
    Recipe,
    Scenario,
    class_scenario,
    fit,
    loader,
    random_scenario,
    stopwatch,
)
from text_table import Row, table

SEED = 0
BATCH = 64
# The paper does not state its batch size. At 64 its 3 epochs would be 57 steps of this data, where
# CIFAR-10 gives 1,000 and more; at 16 they are about 230.
TUNE_BATCH = 16


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


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,347 training and 450 test images, each class in proportion."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # (N, 1, 8, 8), 0 to 1
    y = torch.tensor(labels, dtype=torch.int64)  # (N,)
    train, test = train_test_split(
        torch.arange(len(y)), test_size=0.25, random_state=SEED, stratify=y
    )
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def train_from_scratch(data: Data, epochs: int) -> nn.Module:
    torch.manual_seed(SEED)
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    fit(model, loader(data, BATCH, SEED), optimizer, epochs)
    return model


def play(
    scenario: Scenario, original: nn.Module, spent: float, epochs: int, tune: Recipe
) -> list[Row]:
    """The rows of a scenario's table; the original took `spent` seconds to train."""
    game = Play(scenario, original, BATCH)
    with stopwatch() as gold_seconds:
        gold = train_from_scratch(scenario.retain, epochs)
    game.set_gold(gold)
    game.row("original", original, spent)
    game.row("gold", gold, gold_seconds[0])
    game.unlearned(deepclean.DeepClean(gamma=scenario.gamma), tune)
    game.fine_tuned(tune)
    return game.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15, help="to train a model (default: 15)")
    parser.add_argument("--tune", type=int, default=3, help="epochs of fine-tuning (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args()

    # Layers this small are slower on several threads, and sums would depend on their number.
    torch.set_num_threads(1)
    train, test = digits()
    with stopwatch() as spent:
        original = train_from_scratch(train, options.epochs)
    print(
        f"{len(train)} training and {len(test)} test images, 8 x 8, 10 classes; one seed ({SEED})"
    )
    written = {}
    tune = Recipe(options.tune, TUNE_BATCH, seed=SEED)
    for scenario in (
        class_scenario(train, test, label=0, gamma=2.0),
        random_scenario(train, test, share=0.1, gamma=1.1, seed=SEED),
    ):
        rows = play(scenario, original, spent[0], options.epochs, tune)
        print(f"\n{scenario.title}\n{table(rows, columns(scenario))}")
        written[scenario.title] = rows
    print(f"\n{HOW_TO_READ} {AGAINST_GOLD}")
    if options.json:
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
