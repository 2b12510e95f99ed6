"""gamma="auto" beside every fixed gamma: a trained ResNet-20 on CIFAR-10 forgets a class, or random
samples.

    python -m benchmarks.gamma_auto --data-dir DATA --checkpoint resnet20.th

DATA is as in examples/forget_cifar10.py. The network was trained on all training images, so half of
the test images serve as the validation data that choose gamma, and the other half judges. A
retrained network would be as right on forgotten random samples as the original is on new ones,
never right on a class that it did not see, and elsewhere like the original: `gap` is the mean
distance to that, in percentage points, over forget, retain and test accuracy. Each (scenario, seed)
is written to the output when it is done; a second start goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import deepclean_hooks as deepclean
from benchmarks.lab.data import images
from benchmarks.lab.results import RESULTS, read, write
from benchmarks.lab.timer import Timer
from deepclean_hooks.tuning.gamma_auto import choose_gamma
from deepclean_hooks.tuning.gamma_sweep import GAMMAS
from examples.cifar10 import resnet20
from examples.scenarios import Recipe

BATCH = 64
COMMAND = "python -m benchmarks.gamma_auto --data-dir DATA --checkpoint resnet20.th"
OUTPUT = RESULTS / "gamma_auto_cifar10.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forget", type=int, default=300, help="samples to forget")
    parser.add_argument("--retain", type=int, default=1200, help="samples of the data kept")
    parser.add_argument("--judged", type=int, default=600, help="images of each half of the test")
    parser.add_argument("--epochs", type=int, default=1, help="of the fine-tune")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


def drawn(data: TensorDataset, where: torch.Tensor, count: int, seed: int) -> TensorDataset:
    """`count` of the samples where the mask is True."""
    at = where.nonzero().flatten()
    order = torch.randperm(len(at), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(*(one[at[order[:count]]] for one in data.tensors))


def sets(given: argparse.Namespace, scenario: str, seed: int) -> dict[str, TensorDataset]:
    """forget, retain, held_out, and test, which has none of a forgotten class; seed = its label."""
    data = images("cifar10", given.data_dir)
    train, test = data.train, data.test
    labels, unseen = train.tensors[1], test.tensors[1]
    half = torch.arange(len(unseen)) % 2 == 0
    if scenario == "class":
        gone, judged = labels == seed, unseen != seed
        kept = ~gone
    else:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        gone = torch.zeros(len(labels), dtype=torch.bool)
        gone[order[: given.forget]] = True
        kept, judged = ~gone, torch.ones(len(unseen), dtype=torch.bool)
    return {
        "forget": drawn(train, gone, given.forget, seed),
        "retain": drawn(train, kept, given.retain, seed),
        "held_out": drawn(test, half, given.judged, seed),
        "test": drawn(test, ~half & judged, given.judged, seed),
    }


def accuracies(figures: dict[str, float]) -> dict[str, float]:
    """Of forget, retain and test, in per cent."""
    return {name: figures[f"{name}.accuracy"] for name in ("forget", "retain", "test")}


def cell(given: argparse.Namespace, scenario: str, seed: int) -> dict[str, Any]:
    """Every fixed gamma and the one that "auto" takes, for one scenario and seed."""
    data, original = sets(given, scenario, seed), resnet20(given.checkpoint).eval()
    recipe = Recipe(given.epochs, BATCH, seed=seed)
    with Timer().spent() as spent:
        choice = choose_gamma(
            original,
            data["forget"],
            data["retain"],
            held_out=None if scenario == "class" else data["held_out"],
            batch_size=BATCH,
            progress=False,
        )
    sweep = deepclean.gamma_sweep(
        original,
        data["forget"],
        data["retain"],
        test=data["test"],
        fine_tune=lambda model: recipe(model, data["retain"]),
        batch_size=BATCH,
        progress=False,
    )
    before = accuracies(sweep.original)
    aim = {**before, "forget": 0.0 if scenario == "class" else before["test"]}
    rows = []
    for point in sweep.points:
        after = accuracies(point.tuned)
        gap = statistics.fmean(abs(after[name] - aim[name]) for name in aim)
        rows.append(
            {
                "gamma": point.gamma,
                "selected_fraction": point.selected_entries / sweep.trainable_entries,
                "selected": point.selected,
                "zeroed": accuracies(point.zeroed),
                **after,
                "gap": gap,
            }
        )
    return {
        "scenario": scenario,
        "seed": seed,
        "original": before,
        "aim": aim,
        "choice": choice.to_dict(),
        "choice_seconds": spent[0],
        "entries": sweep.entries,
        "fixed": rows,
    }


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """By scenario: the mean gap of each fixed gamma, of "auto", and of the best in each cell."""
    found: dict[str, Any] = {}
    for scenario in dict.fromkeys(one["scenario"] for one in cells):
        own = [one for one in cells if one["scenario"] == scenario]
        gaps = [{row["gamma"]: row["gap"] for row in one["fixed"]} for one in own]
        fixed = {f"{g:g}": statistics.fmean(one[g] for one in gaps) for g in GAMMAS}
        auto = [one[cell["choice"]["gamma"]] for one, cell in zip(gaps, own, strict=True)]
        found[scenario] = {
            "fixed": fixed,
            "auto": statistics.fmean(auto),
            "best_in_each_cell": statistics.fmean(min(one.values()) for one in gaps),
            "chosen": [one["choice"]["gamma"] for one in own],
            "fixed_gammas_better_on_average": [
                g for g, gap in fixed.items() if gap < statistics.fmean(auto)
            ],
        }
    return found


def main() -> None:
    given = arguments()
    setting = {name: getattr(given, name) for name in ("forget", "retain", "judged", "epochs")}
    cells: list[dict[str, Any]] = []
    if given.output.exists():
        stored = read(given.output)
        cells = stored["cells"] if stored["setting"] == setting else []
    for seed in given.seeds:
        for scenario in ("random", "class"):
            if any((one["scenario"], one["seed"]) == (scenario, seed) for one in cells):
                continue
            cells.append(cell(given, scenario, seed))
            found = summary(cells)
            command = " ".join([COMMAND, *(f"--{k} {v}" for k, v in setting.items())])
            write(given.output, command=command, setting=setting, summary=found, cells=cells)
            print(json.dumps(found[scenario], indent=1), flush=True)


if __name__ == "__main__":
    main()
