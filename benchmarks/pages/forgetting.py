"""How well forgetting went, as tables: one function for each kind of result file."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import table


def pretrained(told: Any) -> str:
    """One request, by examples/forget_cifar10.py."""
    columns = {
        "retain": "retain",
        "forget": "forget",
        "test": "test",
        "test of class": "test, the class",
        "members": "called members",
        "selected": "reset",
    }
    shown = {
        k: v for k, v in columns.items() if any(row.get(k) is not None for row in told["rows"])
    }
    rows = [[row["model"], *(_percent(row.get(name)) for name in shown)] for row in told["rows"]]
    return table(["", *shown.values()], rows)


def evaluated(told: Any) -> str:
    """Means over the seeds, by benchmarks/reports.py."""
    head = ["", "average gap", "forget", "RMIA, AUC (0.5 is best)", "linear probe for the class"]
    rows = []
    for method, figures in told["methods"].items():
        gap = figures["average_gap"]["figures"]
        forget, rmia, probe = (
            figures[name]["figures"]["mean"]
            for name in ("forget.accuracy", "attack.rmia.auc", "probe")
        )
        ulira = told["pools"].get(method, {}).get("ulira")
        apart = "" if ulira is None else f"{ulira['figures']['accuracy']:.0f} %"
        cells = [f"{gap['mean']:.1f} ± {gap['deviation']:.1f}", _percent(forget), f"{rmia:.2f}"]
        rows.append([method, *cells, _percent(probe), apart])
    return table([*head, "told from golds (U-LiRA)"], rows)


def gamma_auto(told: Any) -> str:
    """The mean gap of each fixed gamma, and of the one that is chosen."""
    scenarios = {"class": "a class", "random": "random samples"}
    fixed = list(told["summary"]["class"]["fixed"])
    rows = []
    for scenario, title in scenarios.items():
        found = told["summary"][scenario]
        gaps = [f"{found['fixed'][gamma]:.1f}" for gamma in fixed]
        chosen = ", ".join(f"{gamma:g}" for gamma in found["chosen"])
        rows.append([title, *gaps, f"**{found['auto']:.1f}**", chosen])
    return table(["", *fixed, "auto", "took"], rows)


def in_a_trainer(told: Any) -> str:
    """Before and after one run, from its report."""
    report = told["report"]
    sets = {when: report["scores"][when]["sets"] for when in ("before", "after")}
    names = {"retain": "retain", "forget": "forget", "test": "test", "forget_test": "of the class"}
    names = {name: title for name, title in names.items() if name in sets["after"]}
    rows = [
        [title, *(_percent(sets[when][name]["accuracy"]) for name in names)]
        for when, title in (("before", "original"), ("after", "unlearned"))
    ]
    reset, moved = _percent(100 * report["selected_fraction"]), report["frozen_entries_moved"]
    held = f"Reset: {reset} of the weights; frozen weights that moved: {moved}."
    return f"{table(['', *names.values()], rows)}\n\n{held}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"
