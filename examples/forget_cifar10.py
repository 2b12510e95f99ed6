"""Forget one class of CIFAR-10, or a random part of it, from a trained ResNet-20.

    python examples/forget_cifar10.py --data-dir DATA --checkpoint resnet20.th
    python examples/forget_cifar10.py --data-dir DATA --checkpoint resnet20.th --scenario random

DATA is where torchvision keeps CIFAR-10 (it is downloaded there if it is not), or a folder with a
module load.py. The checkpoint is a state dict of this ResNet-20; without one a network is trained
first (--train-epochs). Compares the original, the model right after the reset, DeepClean and plain
fine-tuning under one recipe: Adam, cosine, no augmentation. With --gold a second checkpoint,
trained without the forget set, gives the gaps.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import deepclean_hooks as deepclean
from cifar10 import CLASSES, cifar10, resnet20
from play import AGAINST_GOLD, HOW_TO_READ, Play, columns
from scenarios import Recipe, Scenario, class_scenario, fit, loader, random_scenario
from text_table import table

GAMMA = {"class": 2.0, "random": 1.1}  # the paper's


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="weights of the trained ResNet-20")
    parser.add_argument("--gold", type=Path, help="weights trained without the forget set")
    parser.add_argument("--scenario", choices=["class", "random"], default="class")
    parser.add_argument("--label", type=int, default=0, help="the class to forget (default: 0)")
    parser.add_argument("--share", type=float, default=0.1, help="of random samples (default: 0.1)")
    parser.add_argument("--gamma", type=float, help="default: 2.0 for a class, 1.1 for random")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning (default: 3)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train-epochs", type=int, default=20, help="without a checkpoint")
    parser.add_argument("--limit", type=int, help="use this many images of each split only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and report there")
    return parser.parse_args()


def trained(options: argparse.Namespace, train: TensorDataset) -> nn.Module:
    """The network of the checkpoint, or one trained here."""
    torch.manual_seed(options.seed)
    model = resnet20(options.checkpoint)
    if options.checkpoint is None:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        batches = loader(train, options.batch_size, options.seed)
        fit(model, batches, optimizer, options.train_epochs)
    return model


def scenario_of(options: argparse.Namespace, train: TensorDataset, test: TensorDataset) -> Scenario:
    gamma = GAMMA[options.scenario] if options.gamma is None else options.gamma
    if options.scenario == "class":
        return class_scenario(train, test, options.label, gamma)
    return random_scenario(train, test, options.share, gamma, options.seed)


def main() -> None:
    options = arguments()
    train, test = cifar10(options.data_dir, limit=options.limit)
    model = trained(options, train)
    scenario = scenario_of(options, train, test)
    about = f" ({CLASSES[options.label]})" if options.scenario == "class" else ""
    print(f"{len(train)} training and {len(test)} test images; {scenario.title}{about}")

    def show(row: object) -> None:
        print(f"  done: {row['model']}", flush=True)

    game = Play(scenario, model, options.batch_size, show)
    if options.gold:
        game.set_gold(resnet20(options.gold))
    recipe = Recipe(options.epochs, options.batch_size, options.lr, options.seed)
    game.row("original", model, None)
    report = game.unlearned(deepclean.DeepClean(gamma=scenario.gamma), recipe)
    game.fine_tuned(recipe)
    print(f"\n{table(game.rows, columns(scenario))}\n\n{HOW_TO_READ}")
    if options.gold:
        print(AGAINST_GOLD)
    if options.json:
        told = {
            "scenario": scenario.title,
            "recipe": {"optimizer": "Adam", "schedule": "cosine to 0", **vars(recipe)},
            "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
            "rows": game.rows,
            "report": report.to_dict(),
        }
        options.json.write_text(json.dumps(told, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
