"""The full evaluation on CIFAR-10: a class or random samples, forgotten by several methods, beside
models that were retrained without them.

    python -m benchmarks.reports --data-dir DATA --cache FOLDER [--images 4000 --epochs 10]

DATA is as in examples/forget_cifar10.py. Originals and retrained models are those of
`benchmarks/paper_tables`, read from its cache or trained into it. Written to benchmarks/results:
`cifar10_class.html` and `cifar10_random.html`, the report of DeepClean's first seed with the other
methods beside it, and the same as JSON with the figures of every method and seed.

The random samples are the same for every seed, so that the retrained models are of one split. With
`--images`, so many training images are used without augmentation: the networks then know their
training data by heart, which is what there is to forget.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepclean_hooks as deepclean
from benchmarks.lab.data import Images
from benchmarks.lab.results import RESULTS, write
from benchmarks.lab.timer import Timer
from benchmarks.paper_tables.models import GOLD_SEED, gold, original, scenario, untrained
from benchmarks.paper_tables.recipes import fast, train
from benchmarks.paper_tables.setups import Setup, setup
from deepclean_hooks.measure.batch_mean import BatchMean
from deepclean_hooks.metrics.gold import spreads
from deepclean_hooks.metrics.pools import klom, margins, ulira
from deepclean_hooks.metrics.relearn import relearn_steps
from deepclean_hooks.report.report import Report
from deepclean_hooks.stored.files import written_whole
from examples.scenarios import Scenario

RELEARN = {"most": 60, "lr": 1e-3}  # steps, of 64 samples
FIGURES = (
    "retain.accuracy",
    "test.accuracy",
    "forget.accuracy",
    "attack.entropy_regression.rate",
    "attack.confidence_svc.efficacy",
    "attack.loss_regression.accuracy",
    "attack.threshold_loss.auc",
    "attack.rmia.auc",
    "probe",
    "zrf",
    "relearn",
)


@dataclasses.dataclass(frozen=True)
class Memorised(Setup):
    """A setup whose training images are never shifted or mirrored."""

    def settings(self) -> dict[str, Any]:
        """With a word of it, so that its models have a folder of their own."""
        return {**super().settings(), "augmentation": "none"}

    @cached_property
    def images(self) -> Images:
        """The data, of a kind that is not augmented."""
        read = super().images
        return dataclasses.replace(read, kind=dataclasses.replace(read.kind, margin=0, flip=False))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("paper_tables_cache"))
    parser.add_argument("--scenarios", nargs="+", default=["class", "random"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, help="training images (default: the small scale's)")
    parser.add_argument("--network", default="resnet8", help="with --images")
    parser.add_argument("--test-images", type=int, help="of the test set, at most")
    parser.add_argument("--epochs", type=int, default=15, help="of training, with --images")
    parser.add_argument("--fine-tune-epochs", type=int, default=3)
    parser.add_argument("--train-only", action="store_true", help="fill the cache, judge nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def setup_of(given: argparse.Namespace) -> Setup:
    small = setup("small", "cifar10", data_dir=given.data_dir, cache=given.cache)
    if given.images is None:
        return small
    own = {
        **{one.name: getattr(small, one.name) for one in dataclasses.fields(small)},
        "train_images": given.images,
        "network": given.network,
        "test_images": given.test_images or small.test_images,
        "recipe": fast(given.epochs),
    }
    return Memorised(**own)


def retrained(one: Setup, name: str, seeds: list[int]) -> list[nn.Module]:
    """Networks that never saw the forget set of seed 0, each trained by another seed."""
    if name == "class":
        return [gold(one, name, seed).model for seed in seeds]
    models = []
    for seed in seeds:
        # The tables' gold of a seed is of that seed's own split: all but the first are ours.
        path = one.folder / f"gold_{name}_of_split_0_{seed}.pt"
        if seed == 0:
            models.append(gold(one, name, 0).model)
            continue
        model = untrained(one, GOLD_SEED + seed)
        if not path.exists():
            kept = scenario(one, name, 0).retain
            train(model, kept, one.images.kind, one.recipe, GOLD_SEED + seed)
            with written_whole(path) as temporary:
                torch.save({"state": model.state_dict()}, temporary)
        model.load_state_dict(torch.load(path, weights_only=True)["state"])
        models.append(model.eval())
    return models


def methods(name: str, gamma: float, seed: int) -> dict[str, deepclean.Method]:
    """By name, the first one the report's; hyper-parameters are the papers'."""
    found: dict[str, deepclean.Method] = {
        "DeepClean": deepclean.DeepClean(gamma=gamma),
        "SSD": deepclean.SSD(estimator=BatchMean(batch_size=64, seed=seed)),
        "class projection": deepclean.ClassProjection(),
        "fine-tune": deepclean.FineTune(),
    }
    return {n: m for n, m in found.items() if name == "class" or n != "class projection"}


class Judge:
    """One scenario's sets, the retrained models, and their figures."""

    def __init__(self, one: Setup, name: str, seeds: list[int]) -> None:
        self.setup, self.sets = one, scenario(one, name, 0)
        self.golds = retrained(one, name, seeds)
        self.untrained = untrained(one, 99)
        self.evaluations = [self.scores(model) for model in self.golds]

    def scores(self, model: nn.Module, gold: Any = None) -> deepclean.Evaluation:
        return deepclean.evaluate(
            model,
            **self.sets.sets(),
            gold=gold,
            untrained=self.untrained,
            probe=True,
            batch_size=256,
            progress=False,
        )

    def told(self, model: nn.Module, to_loss: float, golds: list[float]) -> dict[str, Any]:
        """The evaluation as a dict; with the steps that relearning took, where gold's are given."""
        told = self.scores(model, self.evaluations).to_dict()
        if not golds:
            return told
        found = self.relearn(model, to_loss)
        among = spreads([{"relearn": steps} for steps in golds])["relearn"]
        told["spread"]["relearn"] = dict(vars(among))
        if found.value is not None:
            told["figures"]["relearn"] = found.value
            gap = found.value - among.mean
            told["gaps"]["relearn"], told["within_spread"]["relearn"] = gap, among.holds(gap)
        return told

    def relearn(self, model: nn.Module, to_loss: float) -> Any:
        return relearn_steps(model, self.sets.forget, to_loss=to_loss, batch_size=64, **RELEARN)


def few(sets: Scenario, seed: int) -> tuple[Any, Any]:
    """The samples that class projection is computed from: 900 of each side at most."""
    generator = torch.Generator().manual_seed(seed)

    def some(data: Any) -> Any:
        order = torch.randperm(len(data), generator=generator)[:900]
        return torch.utils.data.Subset(data, sorted(order.tolist()))

    return some(sets.forget), some(sets.retain)


def unlearned(
    judge: Judge, model: nn.Module, method: deepclean.Method, seed: int, epochs: int
) -> Report:
    """Unlearns in place; what the model scores is judged elsewhere."""
    forget, retain = judge.sets.forget, judge.sets.retain
    if isinstance(method, deepclean.ClassProjection):
        forget, retain = few(judge.sets, seed)
    return deepclean.unlearn(
        model,
        forget,
        retain,
        method=method,
        epochs=epochs,
        seed=seed,
        batch_size=64,
        scores=False,
        progress=False,
    )


def pools(judge: Judge, models: list[nn.Module]) -> dict[str, Any]:
    """U-LiRA and KLoM between the unlearned models, one a seed, and the retrained ones."""
    if min(len(models), len(judge.golds)) < 3:
        return {}
    ours, theirs = (
        margins(pool, judge.sets.forget, batch_size=256) for pool in (models, judge.golds)
    )
    far = klom(ours, theirs)
    return {
        "ulira": ulira(ours, theirs).to_dict(),
        "klom": {k: v for k, v in vars(far).items() if k != "per_sample"},
    }


def by_seed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over the seeds of each figure and of its gap."""
    found: dict[str, Any] = {}
    for name in ("average_gap", "js_divergence", "activation_distance", "completeness", *FIGURES):
        for kind in ("figures", "gaps"):
            values = [row[kind][name] for row in rows if row[kind].get(name) is not None]
            if values:
                found.setdefault(name, {})[kind] = {
                    "mean": statistics.fmean(values),
                    "deviation": statistics.stdev(values) if len(values) > 1 else None,
                    "seeds": len(values),
                }
    return found


def brief(told: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one evaluation for the JSON."""
    figures = {name: value for name, value in told["figures"].items() if name in FIGURES}
    figures |= {name: one["value"] for name, one in told["distances"].items()}
    figures["average_gap"] = told["average_gap"]["value"]
    gaps = {name: told["gaps"][name] for name in FIGURES if name in told["gaps"]}
    within = {n: told["within_spread"][n] for n in FIGURES if n in told["within_spread"]}
    return {"figures": figures, "gaps": gaps, "within_spread": within}


def run(given: argparse.Namespace, one: Setup, name: str) -> None:
    judge = Judge(one, name, given.seeds)
    rows: dict[str, list[dict[str, Any]]] = {}
    models: dict[str, list[nn.Module]] = {}
    page: Report | None = None
    shown: dict[str, Any] = {}
    for seed in given.seeds:
        start = original(one, seed).model
        to_loss = 1.05 * judge.scores(start).sets["forget"].loss
        first = seed == given.seeds[0]  # the only one that learns again, which costs the most
        golds = [judge.relearn(model, to_loss).value for model in judge.golds if first]
        steps = [float(RELEARN["most"] if value is None else value) for value in golds]
        before = judge.told(start, to_loss, steps)
        rows.setdefault("original", []).append({"seed": seed, **brief(before)})
        for label, method in methods(name, judge.sets.gamma, seed).items():
            model = copy.deepcopy(start)
            with Timer().spent() as spent:
                report = unlearned(judge, model, method, seed, given.fine_tune_epochs)
            after = judge.told(model, to_loss, steps)
            row = {"seed": seed, "settings": report.settings, "seconds": spent[0], **brief(after)}
            row["selected_fraction"] = report.selected_fraction
            rows.setdefault(label, []).append(row)
            models.setdefault(label, []).append(model)
            if first:
                shown[label] = after
                page = page or dataclasses.replace(
                    report, scores={"before": before, "after": after}
                )
            print(name, seed, label, json.dumps(row["figures"]), flush=True)
    assert page is not None
    found = {label: pools(judge, pool) for label, pool in models.items()}
    write_page(given, one, name, judge, page, shown, rows, found)


def write_page(
    given: argparse.Namespace,
    one: Setup,
    name: str,
    judge: Judge,
    page: Report,
    shown: dict[str, Any],
    rows: dict[str, list[dict[str, Any]]],
    found: dict[str, Any],
) -> None:
    first = next(iter(shown))
    if found[first]:
        after, ulira = page.scores["after"], found[first]["ulira"]
        after["attacks"]["ulira"] = ulira
        named = {f"attack.ulira.{figure}": value for figure, value in ulira["figures"].items()}
        after["figures"] |= {**named, "klom": found[first]["klom"]["mean"]}
    told = {
        "command": "python -m benchmarks.reports --data-dir DATA --cache FOLDER"
        + (
            f" --images {given.images} --epochs {given.epochs} --network {given.network}"
            if given.images
            else ""
        )
        + (f" --test-images {given.test_images}" if given.test_images else ""),
        "setting": {**one.settings(), "fine_tune_epochs": given.fine_tune_epochs},
        "gold": [brief_of_gold(evaluation) for evaluation in judge.evaluations],
        "methods": {label: by_seed(own) for label, own in rows.items()},
        "pools": found,
        "rows": rows,
        "report": page.to_dict(),
    }
    path = given.output / f"cifar10_{name}"
    write(path.with_suffix(".json"), **told)
    path.with_suffix(".html").write_text(page.to_html(compared=shown), encoding="utf-8")


def brief_of_gold(evaluation: deepclean.Evaluation) -> dict[str, float]:
    return {k: v for k, v in evaluation.figures().items() if k in FIGURES}


def main() -> None:
    given = arguments()
    torch.manual_seed(0)
    one = setup_of(given)
    if given.train_only:
        for seed in given.seeds:
            original(one, seed)
        for name in given.scenarios:
            retrained(one, name, given.seeds)
        return
    for name in given.scenarios:
        run(given, one, name)


if __name__ == "__main__":
    main()
