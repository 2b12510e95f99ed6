"""All cells of a setup as one JSON file: rows, and their mean and spread over the seeds."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.lab import results, timer
from deepclean_hooks.metrics.entropy import entropy_regression
from deepclean_hooks.metrics.gold import AVERAGE_GAP

from .cells import BOUNDS, Row
from .methods import CONTENDERS
from .setups import Setup, usual_epochs

FIGURES = (
    "acc_dr",
    "acc_df",
    "acc_test",
    "acc_df_test",
    "mia",
    "mia_attacker_accuracy",
    "delta_acc_dr",
    "delta_acc_df",
    "delta_acc_test",
    "delta_acc_df_test",
    "delta_mia",
    "average_gap",
    "seconds",
    "time_ratio",
    "selected_fraction",
    "dead_fraction",
)
WORST = {"acc_dr": min, "acc_df": max, "acc_test": min, "acc_df_test": max}
_MIA = entropy_regression({})  # what it is, without a figure
DEFINITIONS = {
    "acc_*": "accuracy in per cent on D_r, D_f and the test set; for a class the test set without "
    "it (acc_test) and its test samples (acc_df_test)",
    "delta_*": "minus the figure of the gold of the same seed: retrained on D_r by the original's "
    "recipe, from other initial values",
    "mia": f"{_MIA.orientation}; {_MIA.attacker} on the {_MIA.feature}, fitted on {_MIA.fitted_on}",
    "mia_attacker_accuracy": "how often that attacker is right on what it was fitted on, in per "
    "cent, both sides counting the same: near 50 mia means little",
    "mia_confidence": "100 minus the per cent of D_f that an SVC on the true class's probability "
    "calls members",
    "average_gap": AVERAGE_GAP,
    "seconds": f"{timer.MEANING}: measuring, changing and training; not judging. Where the "
    "Fisher diagonal of D_r was measured once for several rows, each row pays for it; beside a "
    "checkpoint that of the whole training set was measured once, and no row pays for it",
    "time_ratio": "seconds divided by those of training the gold of the same scenario and seed",
    "selected_fraction": "of all trainable entries, 0 to 1",
    "dead_fraction": "of the selected entries, 0 to 1: gradient exactly 0 on D_r, for ever",
}


def rows(setup: Setup) -> list[Row]:
    """The rows of all cells that are done: by seed, scenario, and the tables' order of methods."""
    found = [results.read(path) for path in sorted((setup.folder / "cells").glob("*.json"))]
    order = {name: at for at, name in enumerate(("gold", "original", *CONTENDERS))}

    def place(row: Row) -> tuple[int, str, int, str]:
        known = order[row["method"].partition("@")[0]]
        return row["seed"], row["scenario"], known, row["method"]

    return sorted(found, key=place)


def summary(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """By scenario and method: the number of seeds, and mean and standard deviation of each
    figure."""
    found: dict[str, dict[str, Any]] = {}
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        own = [row for row in rows if row["scenario"] == scenario]
        found[scenario] = {
            method: _statistics([row for row in own if row["method"] == method])
            for method in dict.fromkeys(row["method"] for row in own)
        }
    return found


def _statistics(rows: list[Row]) -> dict[str, Any]:
    told: dict[str, Any] = {"seeds": len(rows)}
    for name in FIGURES:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            told[name] = {"mean": statistics.fmean(values), "std": deviation}
    return told


def over_classes(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """By method and figure: mean, standard deviation and worst over the classes that were forgotten
    in turn, and over the seeds; empty where there is no more than one class."""
    own = [row for row in rows if row["scenario"].startswith("class-")]
    if len({row["scenario"] for row in own}) < 2:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(row["method"] for row in own):
        its = [row for row in own if row["method"] == method]
        found[method] = {"cells": len(its)}
        for name, told in _statistics(its).items():
            if name in WORST:
                told["worst"] = WORST[name](row[name] for row in its if row[name] is not None)
            if name != "seeds":
                found[method][name] = told
    return found


def gold_to_gold(rows: list[Row]) -> dict[str, dict[str, float]]:
    """By scenario and figure: the largest difference between the golds of two seeds; where random
    samples are forgotten these differ in their forget sets too."""
    found: dict[str, dict[str, float]] = {}
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        golds = [r for r in rows if r["scenario"] == scenario and r["method"] == "gold"]
        if len(golds) > 1:
            found[scenario] = {
                name: max(g[name] for g in golds) - min(g[name] for g in golds)
                for name in ("acc_dr", "acc_df", "acc_test", "mia")
            }
    return found


def origin(setup: Setup) -> dict[str, Any]:
    """The machine and the versions of the first run that filled this cache."""
    return results.kept(setup.folder / "origin.json", results.origin)


def command(setup: Setup, rows: list[Row]) -> str:
    """What makes these rows, in one call and without the paths of this machine."""
    words = ["python", "-m", "benchmarks.paper_tables", "--scale", setup.scale]
    words += ["--data", setup.data, "--network", setup.network, "--recipe", setup.recipe.name]
    if setup.data_dir is not None:
        words += ["--data-dir", "DATA"]
    if setup.checkpoint is not None:
        words += ["--checkpoint", setup.checkpoint.name]
    if setup.fine_tune_epochs != usual_epochs(setup.data):
        words += ["--epochs", str(setup.fine_tune_epochs)]
    words += _scenarios(rows)
    words += ["--seeds", *dict.fromkeys(str(row["seed"]) for row in rows)]
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] not in BOUNDS)
    return " ".join([*words, "--methods", *methods, "--device", setup.device])


def _scenarios(rows: list[Row]) -> list[str]:
    """The options that name the scenarios of the rows; none for the usual two."""
    labels = {r["scenario"].partition("-")[2]: "class" for r in rows if "-" in r["scenario"]}
    kinds = dict.fromkeys(r["scenario"].partition("-")[0] for r in rows)
    words = [] if set(kinds) == {"random", "class"} else ["--scenarios", *kinds]
    return [*words, "--classes", *labels] if labels else words


def collected(setup: Setup) -> dict[str, Any]:
    """What is written down of a setup."""
    found = rows(setup)
    made, over = origin(setup), over_classes(found)
    apart = [r for r in found if not (over and r["scenario"].startswith("class-"))]
    told: dict[str, Any] = {
        "machine": made["machine"],
        "command": command(setup, found),
        "versions": made["versions"],
        "setting": setup.settings(),
        "definitions": DEFINITIONS,
        "rows": found,
        "summary": summary(apart),
        "gold_to_gold": gold_to_gold(found),
    }
    return {**told, "over_classes": over} if over else told
