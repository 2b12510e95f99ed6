"""What a whole request costs, from the data to the report, beside retraining by the same recipe.

    OMP_NUM_THREADS=1 python -m benchmarks.whole_run --data DATA --checkpoint resnet20.th

A trained ResNet-20 on CIFAR-10 (DATA as in examples/forget_cifar10.py) forgets 50 samples, 1 %,
10 % and a class, with the Fisher diagonal of the whole training set stored before and without,
scores off and on. Each phase is timed by itself; training is Adam, cosine, no augmentation, for
`--epochs` of the retain set or `--steps`. Retraining is `--retraining` epochs of the same steps,
of which `--sampled` steps are timed. Seconds are the process's own, so that other jobs of the
machine do not count: it needs one thread.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import deepclean_hooks as deepclean
from benchmarks.lab.data import Images, images
from benchmarks.lab.results import write
from benchmarks.lab.timer import comparing, warm_up
from examples.cifar10 import resnet20
from examples.scenarios import loader

BATCH = 128
Row = dict[str, Any]


def requests(labels: torch.Tensor) -> dict[str, list[int]]:
    """What is to be forgotten, by name: indices of the training set."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    shares = {"50 samples": 50, "1 %": len(labels) // 100, "10 %": len(labels) // 10}
    drawn = {name: sorted(order[:count]) for name, count in shares.items()}
    return {**drawn, "class 0": (labels == 0).nonzero().flatten().tolist()}


def train(model: nn.Module, batches: DataLoader[Any], steps: int) -> None:
    """So many steps of the recipe."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    passes = itertools.chain.from_iterable(itertools.repeat(batches))
    for x, y in itertools.islice(passes, steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


class Bench:
    """A network, its data, and what was measured of them once."""

    def __init__(self, model: nn.Module, data: Images, options: argparse.Namespace) -> None:
        self.model, self.data, self.options = model, data, options
        self.timer = comparing(options.device)
        with self.timer.spent() as self.stored_seconds:
            self.stored = deepclean.fisher_diagonal(
                model, data.train, batch_size=BATCH, progress=False
            )

    def step_seconds(self) -> float:
        """Of a step of the recipe, every weight free."""
        model, batches = copy.deepcopy(self.model), loader(self.data.train, BATCH)
        train(model, batches, 2)
        sampled = self.options.sampled
        return self.timer.seconds(lambda: train(model, batches, sampled)) / sampled

    def row(self, name: str, forget: Sequence[int], *, stored: bool, scores: bool) -> Row:
        """The phases of one request, and their sum over that of retraining."""
        out = set(forget)
        kept = [i for i in range(len(self.data.train)) if i not in out]
        gone, retain = Subset(self.data.train, list(forget)), Subset(self.data.train, kept)
        batches = loader(retain, BATCH)
        steps = self.options.steps or self.options.epochs * len(batches)
        model = copy.deepcopy(self.model)
        test: dict[str, TensorDataset] = {"test": self.data.test} if scores else {}
        method = deepclean.DeepClean(gamma=2.0 if name.startswith("class") else 1.1)
        seconds: dict[str, float] = {}
        run = deepclean.Session(
            model, method, scores=scores, batch_size=BATCH, progress=False, **test
        )
        with self.timer.spent() as measuring:
            run.measure(gone, self.stored if stored else retain)
            if stored and scores:
                run.watch(retain=retain)
        seconds["measure"] = measuring[0]
        for phase in ("select", "reset", "guard"):
            seconds[phase] = self.timer.seconds(getattr(run, phase))
        seconds["train"] = self.timer.seconds(lambda: train(model, batches, steps))
        seconds["finish"] = self.timer.seconds(run.finish)
        seconds["report"] = self.timer.seconds(lambda: (run.report.to_json(), run.report.to_html()))
        whole = sum(seconds.values())
        return {
            "request": name,
            "samples": len(forget),
            "stored": stored,
            "scores": scores,
            "steps": steps,
            "seconds": whole,
            "phases": seconds,
            "shares": {phase: spent / whole for phase, spent in seconds.items()},
            "selected_fraction": run.report.selected_fraction,
            "retraining_steps": self.options.retraining * len(batches),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DATA")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=int, help="of the training set (default: all)")
    parser.add_argument("--test-images", type=int, help="of the test set (default: all)")
    parser.add_argument("--only", nargs="+", help="requests by name (default: all four)")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--steps", type=int, help="of fine-tuning, instead of epochs")
    parser.add_argument("--retraining", type=int, default=60, help="epochs (default: 60)")
    parser.add_argument("--sampled", type=int, default=20, help="steps of it that are timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warm_up()
    data = images("cifar10", options.data, train=options.images, test=options.test_images)
    data = data.to(options.device)
    model = resnet20(options.checkpoint).to(options.device).eval()
    bench = Bench(model, data, options)
    step = bench.step_seconds()
    told = {
        "network": "resnet20",
        "images": len(data.train),
        "batch": BATCH,
        "epochs": options.epochs,
        "retraining_epochs": options.retraining,
        "seconds_a_step": step,
        "stored_seconds": bench.stored_seconds[0],
    }
    print(*(f"{name} {value}" for name, value in told.items()), sep="\n", flush=True)
    rows: list[Row] = []
    for name, forget in requests(data.train.tensors[1]).items():
        if options.only and name not in options.only:
            continue
        for stored, scores in itertools.product((True, False), (False, True)):
            row = bench.row(name, forget, stored=stored, scores=scores)
            row["ratio_of_retraining"] = row["seconds"] / (row["retraining_steps"] * step)
            rows.append(row)
            shares = "  ".join(f"{k} {v:.0%}" for k, v in row["shares"].items() if v >= 0.005)
            print(
                f"{name:11} stored {stored!s:5} scores {scores!s:5} {row['seconds']:8.1f} s   "
                f"{row['ratio_of_retraining']:.4f} of retraining   {shares}",
                flush=True,
            )
            if options.json:
                write(options.json, **told, rows=rows)


if __name__ == "__main__":
    main()
