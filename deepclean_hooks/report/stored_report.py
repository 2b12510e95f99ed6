"""A report that was written down: read, checked field by field, and in today's layout."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]
"""A report or an evaluation as plain numbers, strings, lists and dicts."""

SCHEMA = 3
SCHEMAS = (2, SCHEMA)

_COUNT = (int, None)
_SHARE = (float, None)
_TEXT = (str, None)
_MEASURED = {"meaning": str, "value": _SHARE, "reason": _TEXT, "gold_to_gold": _SHARE}
_ATTACK = {
    "feature": str,
    "attacker": str,
    "fitted_on": str,
    "orientation": str,
    "figures": {str: float},
    "reasons": {str: str},
    "roc": [[float]],
}
_SPREAD = {"count": int, "mean": float, "deviation": float, "lowest": float, "highest": float}
_EVALUATION: dict[Any, Any] = {
    "sets": {str: {"count": int, "accuracy": float}},
    "figures": {str: float},
    "attacks": {str: _ATTACK},
    "average_gap": _MEASURED,
    "histograms": {str: {str: [int]}},
    "edges": {str: [float]},
    "gaps": {str: float},
    "spread": {str: _SPREAD},
    "within_spread": {str: bool},
}
_EVALUATION["gold"] = (_EVALUATION, None)
_TRIAL = {
    "gamma": float,
    "selected_entries": int,
    "distance": float,
    "as_unseen": bool,
    "behaviour": {str: _SHARE},
}
_LAYER = {
    "name": str,
    "entries": int,
    "selected": int,
    "dead": _COUNT,
    "held_back": int,
    "may_change": int,
}
_REPORT: dict[Any, Any] = {
    "schema": int,
    "method": str,
    "settings": dict,
    "phase": str,
    "forget_samples": _COUNT,
    "retain_samples": _COUNT,
    "criterion": _TEXT,
    "effect": _TEXT,
    "trainable_entries": _COUNT,
    "selected_entries": _COUNT,
    "selected_fraction": _SHARE,
    "may_change_entries": _COUNT,
    "layers": [_LAYER],
    "norm_statistics": _TEXT,
    "optimizer_steps": _COUNT,
    "frozen_entries_moved": _COUNT,
    "restored_entries": _COUNT,
    "model_before": _TEXT,
    "model_after": _TEXT,
    "seconds": {str: float},
    "scores": {str: (str, _EVALUATION)},
    "warnings": [str],
    "versions": {str: str},
    "forgotten": dict,
    "checkpoint_before": {str: str},
    "checkpoint_after": {str: str},
    "tied": ({str: str}, None),
    "gamma_choice": dict,
    "digest": _TEXT,
}
_FORGOTTEN = {"salt": str, "hashes": [str], "repeated": {str: int}}
_CHOICE = {
    "gamma": float,
    "rule": str,
    "reason": str,
    "original": {str: _SHARE},
    "trials": [_TRIAL],
}


def digest(report: Document) -> str:
    """SHA-256 over all fields but `digest`, as JSON with sorted names: what was damaged, or edited
    by someone who did not know of it, is seen."""
    plain = json.loads(json.dumps({n: v for n, v in report.items() if n != "digest"}, default=str))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class UnknownSchema(ValueError):
    """A report of another version, whose fields may mean something else."""


def load(path: Path) -> dict[str, Any]:
    """What a file of JSON holds, unchecked; raises ValueError if that is no object."""
    try:
        loaded = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_no_name_twice)
    except RecursionError as reason:
        raise ValueError(f"{path} holds no report: it is nested too deeply") from reason
    except ValueError as reason:
        raise ValueError(f"{path} holds no report: {reason}") from reason
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds no report: it is not an object with fields")
    return loaded


def checked(report: Document) -> dict[str, Any]:
    """A report of a known schema in the layout of today's, every field of the type that
    docs/report-schema.md gives it; raises ValueError for anything else."""
    schema = report.get("schema")
    if schema not in SCHEMAS or isinstance(schema, bool):
        known = " and ".join(map(str, SCHEMAS))
        raise UnknownSchema(f"schema {_shown(schema)} is not known; known are {known}")
    current = copy.deepcopy(dict(report)) if schema == SCHEMA else _of_schema_2(report)
    _require(current, _REPORT, "report")
    if current["forgotten"]:
        _require(current["forgotten"], _FORGOTTEN, "forgotten")
    if current["gamma_choice"]:
        _require(current["gamma_choice"], _CHOICE, "gamma_choice")
    return current


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} stands there twice")
    return fields


def _require(value: Any, kind: Any, place: str) -> None:
    """Raises ValueError unless a value is of a kind: a type, several kinds, a list of one kind,
    {str: kind} for any names, or a dict with the kind of each field."""
    if isinstance(kind, tuple):
        if value is None and None in kind:
            return
        fitting = [each for each in kind if each is not None and _outer(value, each)]
        if not fitting:
            raise ValueError(f"{place} must be {_words(kind)}, it is {_shown(value)}")
        return _require(value, fitting[0], place)
    if not _outer(value, kind):
        raise ValueError(f"{place} must be {_words(kind)}, it is {_shown(value)}")
    if isinstance(kind, list):
        for i, item in enumerate(value):
            _require(item, kind[0], f"{place}[{i}]")
    elif isinstance(kind, dict):
        for name in value if str in kind else kind:
            if name not in value:
                raise ValueError(f"{place} has no field {name!r}")
            _require(value[name], kind.get(str, kind.get(name)), f"{place}.{name}")


def _outer(value: Any, kind: Any) -> bool:
    if isinstance(kind, list | dict):
        return isinstance(value, list | tuple if isinstance(kind, list) else dict)
    if kind in (int, float):
        number = int if kind is int else int | float
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(_words, kind))
    if isinstance(kind, list | dict):
        return "a list" if isinstance(kind, list) else "an object"
    names: dict[Any, str] = {
        str: "text",
        int: "an integer",
        float: "a number",
        bool: "true or false",
    }
    return "null" if kind is None else names.get(kind, "an object")


def _shown(value: Any) -> str:
    return repr(value)[:60]


# ------------------------------------------------------------------ schema 2

_EDGES_2 = {
    "confidence": [i / 20 for i in range(21)],
    "loss": [10 ** (i / 2) for i in range(-12, 5)],
}
# Added to schema 2 in the course of time: what a report from before then means.
_DEFAULTS_2: dict[str, Callable[[Document], Any]] = {
    "effect": lambda _: "reset to 0",
    "may_change_entries": lambda report: report.get("selected_entries"),
    "gamma_choice": lambda _: {},
    "tied": lambda _: None,
    "digest": lambda _: None,
    "restored_entries": lambda _: None,
}


def _of_schema_2(report: Document) -> dict[str, Any]:
    current = copy.deepcopy(dict(report))
    for name, default in _DEFAULTS_2.items():
        current.setdefault(name, default(report))
    layers = current.get("layers")
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict):
            layer.setdefault("may_change", layer.get("selected"))
    forgotten = current.get("forgotten")
    if isinstance(forgotten, dict) and isinstance(forgotten.get("hashes"), list):
        counts = Counter(map(str, forgotten["hashes"]))
        forgotten["hashes"] = list(counts)
        forgotten["repeated"] = {value: count for value, count in counts.items() if count > 1}
    scores = current.get("scores")
    if isinstance(scores, dict):
        current["scores"] = {
            when: evaluation_of_schema_2(score) if isinstance(score, dict) else score
            for when, score in scores.items()
        }
    return current


def evaluation_of_schema_2(score: Document) -> dict[str, Any]:
    """An evaluation as schema 2 had it, with its figures and edges written out."""
    current = {**score, "figures": {}, "edges": _EDGES_2}
    try:
        current["figures"] = _figures_2(score)
        entropy = dict(current.pop("membership", {}))
        rate, accuracy = entropy.pop("rate", None), entropy.pop("attacker_accuracy", None)
        reason = entropy.pop("reason", None)
        known = {} if rate is None else {"rate": rate, "attacker_accuracy": accuracy}
        reasons = {"rate": reason} if rate is None and reason else {}
        attack = {**entropy, "figures": known, "reasons": reasons, "roc": []}
        current["attacks"] = {"entropy_regression": attack, **score["attacks"]}
        if isinstance(score.get("gold"), dict):
            current["gold"] = evaluation_of_schema_2(score["gold"])
        for kind in ("gaps", "spread", "within_spread"):
            current[kind] = {_name_2(name): value for name, value in score[kind].items()}
    except (AttributeError, KeyError, TypeError) as reason:
        raise ValueError(f"an evaluation of the report is malformed: {reason}") from reason
    return current


def _name_2(name: str) -> str:
    return "attack.entropy_regression.rate" if name == "membership.rate" else name


def _figures_2(score: Document) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, scores in score["sets"].items():
        for figure in ("accuracy", "loss", "calibration_error"):
            if figure in scores:
                figures[f"{name}.{figure}"] = scores[figure]
        for label, of_class in scores.get("per_class", {}).items():
            for figure in ("accuracy", "loss"):
                figures[f"{name}.{label}.{figure}"] = of_class[figure]
    entropy = score.get("membership", {})
    if entropy.get("rate") is not None:
        figures["attack.entropy_regression.rate"] = entropy["rate"]
    for name, attack in score.get("attacks", {}).items():
        figures |= {f"attack.{name}.{figure}": v for figure, v in attack["figures"].items()}
    for name in ("probe", "zrf", "relearn", "klom"):
        if score.get(name, {}).get("value") is not None:
            figures[name] = score[name]["value"]
    return figures
