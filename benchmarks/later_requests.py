"""What a second request costs when the diagonal of the whole training set was stored: a walk over
its own samples.

    OMP_NUM_THREADS=1 python -m benchmarks.later_requests --data-dir DATA --checkpoint resnet20.th

DATA is as in examples/forget_cifar10.py. The first request measures D_f and D_r of CIFAR-10 with a
trained ResNet-20; the later ones (10 % drawn at random, a class, 50 samples) measure D_f and
subtract it from the stored diagonal. Each selection is compared entry by entry with that of D_f and
D_r measured anew, at gamma 1.1 and 2. Seconds are processor seconds of the session's `measure` and
`select`, wall seconds those of its "fisher" phase; for the later requests the smallest of
`--repeats`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import deepclean_hooks as deepclean
from benchmarks.lab.data import images
from benchmarks.lab.results import write
from benchmarks.lab.timer import Timer
from deepclean_hooks.measure.fisher import fisher_diagonal
from deepclean_hooks.methods import DeepClean
from examples.cifar10 import resnet20

GAMMAS = (1.1, 2.0)
BATCH = 128


def loader(data: TensorDataset, indices: Sequence[int]) -> DataLoader[Any]:
    return DataLoader(Subset(data, list(indices)), batch_size=BATCH)


def measured(model: nn.Module, forget: Any, retain: Any, gamma: float = 2.0) -> deepclean.Session:
    method = DeepClean(gamma=gamma)
    run = deepclean.Session(model, method, scores=False, progress=False).measure(forget, retain)
    run.select()
    return run


def cost(model: nn.Module, forget: Any, retain: Any, repeats: int = 1) -> tuple[float, float]:
    """Processor and wall seconds of a request."""
    timer, seconds, wall = Timer(processor=True), [], []
    for _ in range(repeats):
        with timer.spent() as spent:
            wall.append(measured(model, forget, retain).report.seconds["fisher"])
        seconds += spent
    return min(seconds), min(wall)


def differing(model: nn.Module, forget: Any, stored: Any, direct: Any) -> dict[str, Any]:
    """For each gamma the entries selected, and how many of all are selected in one way only."""
    told = {}
    for gamma in GAMMAS:
        ours = measured(model, forget, stored, gamma).selection.masks
        truth = measured(model, forget, direct, gamma).selection.masks
        told[f"{gamma:g}"] = {
            "selected": sum(int(mask.sum()) for mask in truth.values()),
            "differing": sum(int((ours[name] != mask).sum()) for name, mask in truth.items()),
        }
    return told


def requests(labels: torch.Tensor, out: Sequence[int]) -> dict[str, list[int]]:
    """The later requests by name: indices that the first did not take."""
    left = sorted(set(range(len(labels))) - set(out))
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(1)).tolist()
    drawn = [left[i] for i in order]
    return {
        "10 % at random": sorted(drawn[: len(labels) // 10]),
        "class 0": [i for i in left if labels[i] == 0],
        "50 samples": sorted(drawn[:50]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000, help="of the training set")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = images("cifar10", options.data_dir, train=options.images).train
    labels = data.tensors[1]
    model = resnet20(options.checkpoint)
    generator = torch.Generator().manual_seed(0)
    everyone = range(len(labels))
    out = sorted(torch.randperm(len(labels), generator=generator)[: len(labels) // 10].tolist())

    rest = sorted(set(everyone) - set(out))
    seconds, wall = cost(model, loader(data, out), loader(data, rest))
    first = {"request": "first", "forget": len(out), "seconds": seconds, "wall_seconds": wall}
    print(f"first: {seconds:.1f} s for {len(everyone)} images", flush=True)

    # What the owner of the model stores once, and what is left of it after the first request.
    stored = fisher_diagonal(model, loader(data, everyone), progress=False)
    stored = stored - fisher_diagonal(model, loader(data, out), progress=False)
    rows = []
    for name, forget in requests(labels, out).items():
        walked = loader(data, forget)
        again, wall = cost(model, walked, stored, options.repeats)
        retain = sorted(set(rest) - set(forget))
        direct = fisher_diagonal(model, loader(data, retain), progress=False)
        rows.append(
            {
                "request": name,
                "forget": len(forget),
                "seconds": again,
                "wall_seconds": wall,
                "of_first": again / seconds,
                "ms_per_sample": 1000 * again / len(forget),
                "gamma": differing(model, walked, stored, direct),
            }
        )
        print(rows[-1], flush=True)
    if options.json:
        write(
            options.json,
            images=len(everyone),
            batch=BATCH,
            repeats=options.repeats,
            first=first,
            later=rows,
        )


if __name__ == "__main__":
    main()
