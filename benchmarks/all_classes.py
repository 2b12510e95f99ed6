"""Every class of CIFAR-10 forgotten in turn by several methods, from a trained ResNet-20.

    python benchmarks/all_classes.py --data-dir DATA --checkpoint resnet20.th
    python benchmarks/all_classes.py --data-dir DATA --checkpoint resnet20.th --scenario random

DATA is as in examples/forget_cifar10.py. Each cell, one method and one class, is written to the
output file when it is done; a second start goes on from there. What is measured of the whole
training set, whatever is to be forgotten, is measured once and kept beside the output: the Fisher
diagonal (`.fisher.safetensors`), the squared batch means of `ssd` (`.means.SEED.safetensors`) and
the layer inputs of `projection-all` (`.inputs.safetensors`), so that a cell walks its forget set
only. `seconds` is of the cell, without that and without judging.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.measure.batch_mean import BatchMean
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.layer_inputs import InputGrams, LayerInputs
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.measure.request import Request
from deepclean_hooks.methods import ASSD, SSD, ClassProjection, FineTune
from deepclean_hooks.report.report import versions
from deepclean_hooks.stored.files import written_whole
from deepclean_hooks.tuning.projection import search
from machine import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from cifar10 import CLASSES, cifar10, resnet20  # noqa: E402  # found by the line above
from scenarios import Scenario, class_scenario, fit, loader, random_scenario  # noqa: E402

BATCH = 128
# Of each retain class, and of the forget class: what the paper takes on CIFAR-10 (900 and 900).
PROJECTION_RETAIN, PROJECTION_FORGET = 100, 900
ACCURACIES = ("retain", "forget", "retain_test", "forget_test")
GAMMA = {"class": 2.0, "random": 1.1}  # the paper's
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--scenario", choices=["class", "random"], default="class")
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=DEFAULT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data order and split")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning (default: 3)")
    parser.add_argument("--limit", type=int, help="use this many images of each split only")
    parser.add_argument("--device", default="cpu", help="where the data and networks lie")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results")
    return parser.parse_args()


class Bench:
    """The data, the network and what was measured of it once."""

    def __init__(self, options: argparse.Namespace, output: Path) -> None:
        self.options, self.output = options, output
        sets = cifar10(options.data_dir, limit=options.limit)
        self.train, self.test = (
            TensorDataset(*(t.to(options.device) for t in one.tensors)) for one in sets
        )
        network = resnet20(options.checkpoint).to(options.device)
        # 14 % faster on a CPU, and the data needs no change.
        self.original = network.to(memory_format=torch.channels_last).eval()

    def scenario(self, label: int | None, seed: int) -> Scenario:
        gamma = GAMMA[self.options.scenario]
        if label is not None:
            return class_scenario(self.train, self.test, label, gamma)
        return random_scenario(self.train, self.test, 0.1, gamma, seed)

    def fisher(self) -> deepclean.FisherDiagonal:
        """Of the whole training set, every parameter."""
        path = self.output.with_suffix(".fisher.safetensors")
        if not path.exists():
            deepclean.fisher_diagonal(self.original, self.train, batch_size=BATCH).save(path)
        return deepclean.FisherDiagonal.load(path, self.options.device)

    def inputs(self) -> InputGrams:
        """Of the whole training set, every layer."""
        path = self.output.with_suffix(".inputs.safetensors")
        if not path.exists():
            self.measured(LayerInputs(), ClassProjection()).save(path)
        return InputGrams.load(path, self.options.device)

    def means(self, method: SSD, seed: int) -> Measurement:
        """Squared batch means of the whole training set, in the method's own order."""
        path = self.output.with_suffix(f".means.{seed}.safetensors")
        if not path.exists():
            self.measured(method.estimator, method).save(path)
        return Measurement.load(path, self.options.device)

    def measured(self, estimator: Estimator, method: deepclean.Method) -> Measurement:
        """Of the whole training set, what the method may select."""
        source = samples_of(self.train, batch_size=BATCH)
        return estimator(Request(self.original, source, "train", parameters=method.may_select))

    def few(self, scenario: Scenario, seed: int) -> tuple[Subset[Any], Subset[Any]]:
        """The samples that the projection is computed from."""
        generator = torch.Generator().manual_seed(seed)

        def draw(data: Any, count: int) -> Subset[Any]:
            order = torch.randperm(len(data), generator=generator)[:count]
            return Subset(data, sorted(order.tolist()))

        count = PROJECTION_RETAIN * (len(CLASSES) - 1)
        return draw(scenario.forget, PROJECTION_FORGET), draw(scenario.retain, count)

    def judged(self, model: nn.Module, scenario: Scenario) -> dict[str, float | None]:
        """The accuracies in per cent; of the whole test set, as retain_test, for random samples."""
        scores = deepclean.evaluate(
            model, **scenario.sets(), membership=False, batch_size=BATCH
        ).sets
        found = {"retain": "retain", "forget": "forget"}
        found |= {"retain_test": "test", "forget_test": "forget_test"}
        return {
            f"{name}_accuracy": scores[key].accuracy if key in scores else None
            for name, key in found.items()
        }


def by_session(
    method: deepclean.Method,
    forget: Any,
    retain: Any,
    model: nn.Module,
    train: Callable[[], None] = lambda: None,
) -> deepclean.Report:
    with deepclean.unlearning(
        model, forget=forget, retain=retain, method=method, scores=False, batch_size=BATCH
    ) as run:
        train()
    return run.report


def deep_clean(
    bench: Bench, scenario: Scenario, model: nn.Module, seed: int, most: float | None = None
) -> Any:
    """`most`: the share of the entries that may be selected at most."""
    method = deepclean.DeepClean(gamma=scenario.gamma, max_selected=most)
    return by_session(
        method, scenario.forget, bench.fisher(), model, lambda: recipe(bench, scenario, model, seed)
    )


def fine_tune(bench: Bench, scenario: Scenario, model: nn.Module, seed: int) -> Any:
    return by_session(
        FineTune(),
        scenario.forget,
        scenario.retain,
        model,
        lambda: recipe(bench, scenario, model, seed),
    )


def recipe(bench: Bench, scenario: Scenario, model: nn.Module, seed: int) -> None:
    """The same for all that train: Adam 1e-3, cosine to 0, no augmentation."""
    batches = loader(scenario.retain, BATCH, seed)
    fit(model, batches, torch.optim.Adam(model.parameters(), lr=1e-3), bench.options.epochs)


def ssd(bench: Bench, scenario: Scenario, model: nn.Module, seed: int) -> Any:
    """Squared batch means in shuffled order, alpha 10, as in the comparison of Kodge et al."""
    compared = compared_ssd(seed)
    return by_session(compared, scenario.forget, bench.means(compared, seed), model)


def compared_ssd(seed: int) -> SSD:
    return SSD(estimator=BatchMean(batch_size=64, seed=seed))


def ssd_in_order(bench: Bench, scenario: Scenario, model: nn.Module, seed: int) -> Any:
    """Squared batch means in the order of SSD's own code: the retain set, then the forget set."""
    published = SSD(estimator=BatchMean(batch_size=64))
    return by_session(published, scenario.forget, scenario.retain, model)


def ssd_exact(bench: Bench, scenario: Scenario, model: nn.Module, seed: int) -> Any:
    """With the exact Fisher, at an alpha that a tenth of the data can reach (below 10)."""
    return by_session(SSD(alpha=5.0), scenario.forget, bench.fisher(), model)


def assd(bench: Bench, scenario: Scenario, model: nn.Module, seed: int) -> Any:
    return by_session(ASSD(), scenario.forget, bench.fisher(), model)


def projection(bench: Bench, scenario: Scenario, model: nn.Module, seed: int) -> Any:
    forget, retain = bench.few(scenario, seed)
    return by_session(ClassProjection(), forget, retain, model)


def projection_searched(bench: Bench, scenario: Scenario, model: nn.Module, seed: int) -> Any:
    forget, retain = bench.few(scenario, seed)
    best = search(model, forget, retain, batch_size=BATCH, progress=False)[0].method
    return by_session(best, forget, retain, model)


def projection_all(bench: Bench, scenario: Scenario, model: nn.Module, seed: int) -> Any:
    return by_session(ClassProjection(), scenario.forget, bench.inputs(), model)


METHODS: dict[str, Callable[[Bench, Scenario, nn.Module, int], Any]] = {
    "original": lambda bench, scenario, model, seed: None,
    "deepclean": deep_clean,
    "deepclean-10%": functools.partial(deep_clean, most=0.1),
    "ssd": ssd,
    "ssd-in-order": ssd_in_order,
    "ssd-exact": ssd_exact,
    "assd": assd,
    "projection": projection,
    "projection-searched": projection_searched,
    "projection-all": projection_all,
    "fine-tune": fine_tune,
}
DEFAULT = [
    "original",
    "ssd",
    "ssd-exact",
    "assd",
    "projection",
    "projection-searched",
    "deepclean",
    "fine-tune",
]


def cell(bench: Bench, method: str, label: int | None, seed: int) -> Row:
    """One method's row for one class (None: random samples)."""
    torch.manual_seed(seed)
    scenario, model = bench.scenario(label, seed), copy.deepcopy(bench.original)
    if method.startswith("deepclean") or method in ("ssd-exact", "assd"):
        bench.fisher()
    if method == "projection-all":
        bench.inputs()
    if method == "ssd":
        bench.means(compared_ssd(seed), seed)
    start = time.perf_counter()
    report = METHODS[method](bench, scenario, model, seed)
    spent = time.perf_counter() - start
    row: Row = {"method": method, "forgotten_class": label, "seed": seed}
    row |= {**bench.judged(model, scenario), "seconds": spent}
    if report is not None:
        row["settings"] = report.settings
        row["selected_fraction"] = report.selected_fraction
        row["frozen_entries_moved"] = report.frozen_entries_moved
    return row


def summary(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """By method and figure: mean, standard deviation and worst over the classes and seeds."""
    found: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        found[method] = {"cells": len(own)}
        for name in (*(f"{name}_accuracy" for name in ACCURACIES), "seconds"):
            values = [row[name] for row in own if row[name] is not None]
            if values:
                worst = min if name.startswith("retain") else max
                found[method][name] = {
                    "mean": statistics.fmean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                    "worst": worst(values),
                }
    return found


def cells(options: argparse.Namespace) -> list[tuple[str, int | None, int]]:
    labels: list[int | None] = list(options.classes) if options.scenario == "class" else [None]
    methods = [
        method
        for method in options.methods
        if options.scenario == "class" or not method.startswith("projection")
    ]
    return [(m, label, seed) for m in methods for label in labels for seed in options.seeds]


def write(output: Path, told: dict[str, Any]) -> None:
    with written_whole(output) as temporary:
        Path(temporary).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a file share."""
    return {"scenario": options.scenario, "epochs": options.epochs, "limit": options.limit}


def main() -> None:
    options = arguments()
    name = "all_classes" if options.scenario == "class" else "random"
    output = options.output or ROOT / "benchmarks" / "results" / f"cifar10_resnet20_{name}.json"
    command = shlex.join(["python", f"benchmarks/{Path(__file__).name}", *public(sys.argv[1:])])
    told: dict[str, Any] = {"machine": machine(), "command": command, "versions": versions()}
    told |= {**setting(options), "rows": [], "summary": {}}
    if output.exists():
        earlier = json.loads(output.read_text(encoding="utf-8"))
        if any(earlier.get(key) != value for key, value in setting(options).items()):
            raise SystemExit(f"{output} holds rows of another setting; pass another --output")
        told["rows"] = earlier["rows"]
    bench = Bench(options, output)
    for method, label, seed in cells(options):
        key = {"method": method, "forgotten_class": label, "seed": seed}
        if any(key.items() <= row.items() for row in told["rows"]):
            continue
        row = cell(bench, method, label, seed)
        told["rows"].append(row)
        told["summary"] = summary(told["rows"])
        write(output, told)
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    for method, figures in told["summary"].items():
        print(method, {k: v for k, v in figures.items() if k != "seconds"})


def public(words: list[str]) -> list[str]:
    """The command line without the paths of this machine."""
    return [Path(word).name if "/" in word else word for word in words]


if __name__ == "__main__":
    main()
