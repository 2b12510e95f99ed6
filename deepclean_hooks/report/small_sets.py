"""Figures of very small sets, which tell of single samples, taken out of a report.

The loss of a single sample is a number that singles it out among all candidates, and its class
stands beside it. A share of few samples says little more than each answer, and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepclean_hooks.report.stored_report import Document

LEAST = 10  # samples that a set or a class needs for its figures to be shown
WHY = f"withheld: of fewer than {LEAST} samples it would tell of single ones (see exact=)"
# Of a small forget set: shares of its samples, not values of them.
_SHARES = {
    "attack.entropy_regression.rate",
    "attack.entropy_regression.attacker_accuracy",
    "attack.confidence_svc.efficacy",
    "probe",
}
_OF_THE_FORGET_SET = ("attack.", "zrf", "relearn", "klom")


def withheld(report: Document) -> dict[str, Any]:
    """The report without figures of sets and classes of fewer than LEAST samples; `withheld` says
    which."""
    scores = report["scores"]
    kept: dict[str, Any] = {**report, "scores": {}, "withheld": dict(report.get("withheld", {}))}
    for when, score in scores.items():
        kept["scores"][when] = evaluation(score) if isinstance(score, Mapping) else score
        if isinstance(score, Mapping):
            small, classes = _small(score)
            known = kept["withheld"].get("sets", []), kept["withheld"].get("classes", [])
            sets = sorted({*known[0], *small})
            of_classes = sorted({*known[1], *(name for name, few in classes.items() if few)})
            if sets or of_classes:
                kept["withheld"] = {"least": LEAST, "sets": sets, "classes": of_classes}
    choice = report.get("gamma_choice")
    if choice and (report["forget_samples"] or 0) < LEAST:
        trials = [
            {**trial, "behaviour": _blurred(trial["behaviour"])} for trial in choice["trials"]
        ]
        original = _blurred(choice["original"])
        kept["gamma_choice"] = {**choice, "original": original, "trials": trials}
    return kept


def evaluation(score: Document) -> dict[str, Any]:
    """The evaluation without figures of sets and classes of fewer than LEAST samples."""
    small, classes = _small(score)
    few = bool(small & {"forget", "forget_test"})

    def hidden(name: str) -> bool:
        of_set, *rest = name.split(".")
        if of_set in score["sets"]:
            in_class = len(rest) > 1 and rest[0] in classes[of_set]
            return in_class or (of_set in small and rest != ["accuracy"])
        return few and name.startswith(_OF_THE_FORGET_SET) and name not in _SHARES

    kept = dict(score)
    for kind in ("figures", "gaps", "spread", "within_spread"):
        kept[kind] = {name: value for name, value in score[kind].items() if not hidden(name)}
    kept["sets"] = {
        name: {key: of_set[key] for key in ("count", "accuracy")}
        if name in small
        else {
            **of_set,
            "per_class": {
                label: value
                for label, value in of_set.get("per_class", {}).items()
                if label not in classes[name]
            },
        }
        for name, of_set in score["sets"].items()
    }
    kept["histograms"] = {n: counts for n, counts in score["histograms"].items() if n not in small}
    if few:
        kept["attacks"] = {name: _attack(name, each) for name, each in score["attacks"].items()}
        kept["distances"] = {
            name: {**far, "value": None, "gold_to_gold": None, "reason": WHY}
            if name != "completeness"
            else far
            for name, far in score.get("distances", {}).items()
        }
        if "zrf" in score:
            kept["zrf"] = {**score["zrf"], "value": None, "reason": WHY}
    if isinstance(score.get("gold"), Mapping):
        kept["gold"] = evaluation(score["gold"])
    return kept


def _small(score: Document) -> tuple[set[str], dict[str, set[str]]]:
    """The sets that are too small, and of each set that is not the classes that are."""
    sets = score["sets"]
    small = {name for name, of_set in sets.items() if of_set["count"] < LEAST}
    classes = {
        name: set() if name in small else _few(of_set.get("per_class", {}))
        for name, of_set in sets.items()
    }
    return small, classes


def _few(per_class: Mapping[str, Any]) -> set[str]:
    """The classes with few samples, and so many more that what is left over, the whole set minus
    the classes that are shown, is of LEAST samples too."""
    few: set[str] = set()
    left_over = 0
    for label, of_class in sorted(per_class.items(), key=lambda item: item[1]["count"]):
        if of_class["count"] >= LEAST and (not few or left_over >= LEAST):
            break
        few.add(label)
        left_over += of_class["count"]
    return few


def _attack(name: str, attack: Document) -> dict[str, Any]:
    shares = {f: v for f, v in attack["figures"].items() if f"attack.{name}.{f}" in _SHARES}
    lost = [*(f for f in attack["figures"] if f not in shares), *attack["reasons"]]
    return {**attack, "figures": shares, "reasons": dict.fromkeys(lost, WHY), "roc": []}


def _blurred(behaviour: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if name == "forget_loss" else value for name, value in behaviour.items()}
