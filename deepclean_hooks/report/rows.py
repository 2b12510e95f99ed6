"""What a report says, in words and rows, before it becomes a page: read from `Report.to_dict()`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Told = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One figure of the original, the unlearned and the gold models, and what to make of it."""

    label: str
    meaning: str
    before: float | None
    after: float | None
    gold: float | None
    gap: float | None
    verdict: str
    unit: str

    def cells(self) -> tuple[str, str, str, str, str]:
        """The label and the figures as text, a dash where there is none."""
        return (
            self.label,
            self._text(self.before),
            self._text(self.after),
            self._text(self.gold),
            "-" if self.gap is None else f"{self.gap:+.{self._digits}f}",
        )

    @property
    def _digits(self) -> int:
        return 1 if self.unit in ("%", "steps") else 3

    def _text(self, value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.{self._digits}f}{' %' if self.unit == '%' else ''}"


PHASES = {
    "evaluate": "scoring",
    "fisher": "measuring",
    "choose gamma": "choosing gamma",
    "select": "selecting",
    "reset": "resetting",
    "dead": "looking for weights that cannot be trained",
    "fine-tune": "training",
}

# (figure, label, meaning, unit)
FIGURES = (
    (
        "retain.accuracy",
        "Accuracy, data kept",
        "how often the model is right on what it may keep; should stay high",
        "%",
    ),
    (
        "test.accuracy",
        "Accuracy, new data",
        "how often it is right on data it never saw; should stay high",
        "%",
    ),
    (
        "forget.accuracy",
        "Accuracy, forgotten data",
        "should be that of a model that never saw them, no higher and no lower",
        "%",
    ),
    (
        "forget_test.accuracy",
        "Accuracy, new data like the forgotten",
        "unseen data of the same kind, such as the forgotten class",
        "%",
    ),
    ("forget.loss", "Loss, forgotten data", "how surprised the model is by the forgotten data", ""),
    (
        "membership.rate",
        "Called training data (entropy)",
        "share of the forgotten data that an attacker takes for training data",
        "%",
    ),
    (
        "attack.confidence_svc.efficacy",
        "Called new data (confidence)",
        "share of the forgotten data that an attacker takes for new data; higher is forgotten",
        "%",
    ),
    (
        "attack.loss_regression.accuracy",
        "Told from new data (loss)",
        "how often an attacker tells forgotten from new data: 50 % is guessing, and best",
        "%",
    ),
    (
        "attack.threshold_loss.auc",
        "Told from new data (loss, AUC)",
        "0.5 is best; near 1 the forgotten data are recognised, near 0 they stand out as strange",
        "",
    ),
    (
        "attack.rmia.auc",
        "Told from new data (RMIA, AUC)",
        "the same by an attacker who compares with retrained models",
        "",
    ),
    (
        "attack.rmia.tpr_at_1_percent_fpr",
        "Caught with 1 % false alarms (RMIA)",
        "share of the forgotten data that are recognised almost for sure; 1 % is guessing",
        "%",
    ),
    ("probe", "Class still readable inside", "linear probe on the last features", "%"),
    ("zrf", "ZRF", "likeness of the outputs to an untrained model's", ""),
    (
        "attack.ulira.auc",
        "Told from retrained models (U-LiRA, AUC)",
        "by an attacker who has many models of either kind and looks at single samples; 0.5 is "
        "best",
        "",
    ),
    (
        "relearn",
        "Steps to learn them again",
        "far fewer than a retrained model needs mean that they were hidden, not gone",
        "steps",
    ),
    (
        "klom",
        "Distance of margins (KLoM)",
        "of many unlearned models from retrained ones, sample by sample, in nats; 0 is the same",
        "",
    ),
)
# Of FIGURES, those by which methods are put side by side.
COMPARED = (
    "retain.accuracy",
    "test.accuracy",
    "forget.accuracy",
    "membership.rate",
    "attack.loss_regression.accuracy",
    "attack.rmia.auc",
    "relearn",
)


def figures_of(score: Any) -> dict[str, float]:
    """The figures of an evaluation's dict by name, as `Evaluation.figures` has them."""
    if not isinstance(score, Mapping):
        return {}
    found: dict[str, float] = {}
    for name, one in score.get("sets", {}).items():
        for figure in ("accuracy", "loss", "calibration_error"):
            if figure in one:
                found[f"{name}.{figure}"] = one[figure]
        for label, of_class in one.get("per_class", {}).items():
            for figure in ("accuracy", "loss"):
                found[f"{name}.{label}.{figure}"] = of_class[figure]
    if score.get("membership", {}).get("rate") is not None:
        found["membership.rate"] = score["membership"]["rate"]
    for name, attack in score.get("attacks", {}).items():
        found |= {f"attack.{name}.{figure}": v for figure, v in attack["figures"].items()}
    for name in ("probe", "zrf", "relearn", "klom"):
        if score.get(name, {}).get("value") is not None:
            found[name] = score[name]["value"]
    return found


def compared(evaluations: Mapping[str, Told]) -> dict[str, list[Row]]:
    """The rows of COMPARED for each of several methods that any of them has a figure of."""
    tables = {
        name: {row.label: row for row in rows({"scores": {"after": one}})}
        for name, one in evaluations.items()
    }
    labels = [label for name, label, _, _ in FIGURES if name in COMPARED]
    shown = [label for label in labels if any(label in table for table in tables.values())]
    nothing = Row("", "", None, None, None, None, "", "")
    return {
        name: [table.get(label, replace(nothing, label=label)) for label in shown]
        for name, table in tables.items()
    }


def rows(report: Told) -> list[Row]:
    """The figures that a page shows, in order; those that neither evaluation has are left out."""
    scores = report["scores"]
    before, after = (figures_of(scores.get(when)) for when in ("before", "after"))
    final: Told = scores["after"] if isinstance(scores.get("after"), Mapping) else {}
    gaps, spread = final.get("gaps", {}), final.get("spread", {})
    return [
        Row(
            label,
            meaning,
            before.get(name),
            after.get(name),
            spread[name]["mean"] if name in spread else None,
            gaps.get(name),
            _verdict(name, final, unit),
            unit,
        )
        for name, label, meaning, unit in FIGURES
        if name in before or name in after
    ]


def _verdict(name: str, final: Told, unit: str) -> str:
    spread = final.get("spread", {}).get(name)
    if spread is None or name not in final.get("gaps", {}):
        return "nothing to compare with"
    within = final.get("within_spread", {}).get(name)
    if within is None:
        return "one retrained model only"
    width = spread["highest"] - spread["lowest"]
    told = f"{width:.1f} points" if unit == "%" else f"{width:.3f}"
    return f"{'within' if within else 'beyond'} the spread ({told})"


def golds(report: Told) -> int:
    """How many gold models the final evaluation was compared with."""
    after = report["scores"].get("after")
    spread = after.get("spread", {}) if isinstance(after, Mapping) else {}
    return max((one["count"] for one in spread.values()), default=0)


def effect(report: Told) -> str:
    """What became of the selected entries."""
    return str(report.get("effect", "reset to 0"))  # an older report has no other method's words


def frozen(report: Told) -> int:
    """How many trainable entries were neither selected nor free to train."""
    # In what older reports are of, only the selected entries were free.
    may_change = report.get("may_change_entries", report["selected_entries"])
    return int((report["trainable_entries"] or 0) - (may_change or 0))


def asked(report: Told) -> list[str]:
    """What was asked, in sentences."""
    settings = ", ".join(f"{name} = {value}" for name, value in report["settings"].items())
    lines = []
    if report["forget_samples"] is not None:
        lines.append(
            f"Forget {report['forget_samples']:,} training samples; keep what was learned from "
            f"{report['retain_samples']:,} others."
        )
    return [*lines, f"Method: {report['method']}" + (f" ({settings})." if settings else ".")]


def done(report: Told) -> list[str]:
    """What was done, in sentences; phases that have not happened are left out."""
    lines = []
    choice = report.get("gamma_choice")
    if choice:
        tried = ", ".join(f"{one['gamma']:g}" for one in choice["trials"])
        lines.append(
            f"gamma = {choice['gamma']:g} was chosen out of {tried} without test data: "
            f"{choice['reason']}. Rule: {choice['rule']}."
        )
    if report["selected_entries"]:
        lines.append(
            f"{report['selected_entries']:,} of {report['trainable_entries']:,} weights "
            f"({100 * report['selected_fraction']:.1f} %) were selected and {effect(report)}. "
            f"Criterion: {report['criterion']}."
        )
    elif report["selected_entries"] is not None:
        lines.append("No weight was selected.")
    if report["optimizer_steps"]:
        lines.append(f"Training followed, in {report['optimizer_steps']:,} steps.")
    held = frozen(report)
    if report["frozen_entries_moved"] is not None and held:
        moved = report["frozen_entries_moved"]
        lines.append(
            f"The {held:,} other weights were held: compared bit for bit at the end, "
            + ("none had changed." if not moved else f"{moved:,} HAD CHANGED.")
        )
    elif report["frozen_entries_moved"] is not None:
        lines.append("No weight was held: every one was free to train.")
    if report["seconds"]:
        spent = ", ".join(f"{PHASES.get(p, p)} {s:.1f} s" for p, s in report["seconds"].items())
        lines.append(f"Time: {spent}.")
    if report["phase"] != "finished":
        lines.append(f"The run is not finished: its phase is {report['phase']!r}.")
    return lines


def caveats(report: Told) -> list[str]:
    """What the figures do not show, in plain words."""
    count, after = golds(report), report["scores"].get("after")
    lines = [f"The run warned: {text}." for text in report["warnings"]]
    if isinstance(after, str):
        lines.append(f"The final scores were {after}.")
    if count == 0:
        lines.append(
            "No model retrained without the forgotten data was given. Nothing here shows that the "
            "figures are those that such a model would have, which is what forgetting means."
        )
    elif count == 1:
        lines.append(
            "There is one retrained model. Retrained models differ among themselves, so a gap may "
            "be chance: compare with three or more."
        )
    else:
        lines.append(
            f"A gap counts as within the spread if it is no larger than the largest difference "
            f"between two of the {count} retrained models. With three of them a fourth retrained "
            "model would fail one such comparison in four (with five, one in eleven), so a single "
            "failure means little."
        )
    lines += _of_the_outcome(after)
    lines += [
        "The attacks judge the forgotten data as a whole. A single person's sample may be exposed "
        "although the average is not; only attacks with pools of models (U-LiRA) look at that.",
        "A low accuracy on the forgotten data is no proof: a model that does worse on them than "
        "one that never saw them gives them away too.",
        "One run with one seed was judged. Another seed of the original model may come out "
        "otherwise.",
        "Copies made earlier still know the forgotten data: other checkpoints, optimizer files, "
        "averaged weights, logs, and models trained from this one.",
    ]
    if report["norm_statistics"] == "update":
        lines.append(
            "Running statistics of normalisation layers are no weights: the training loop was free "
            "to refresh them from the data kept."
        )
    return lines


def _of_the_outcome(after: Any) -> list[str]:
    if not isinstance(after, Mapping):
        return []
    lines = []
    gaps, within = after.get("gaps", {}), after.get("within_spread", {})
    gap = gaps.get("forget.accuracy", 0.0)
    if gap < -1 and not within.get("forget.accuracy", False):
        lines.append(
            f"The model is right on the forgotten data {-gap:.1f} percentage points less often "
            "than a retrained one: it forgot more than it should, which can be noticed."
        )
    if gap > 1 and not within.get("forget.accuracy", False):
        lines.append(
            f"The model is right on the forgotten data {gap:.1f} percentage points more often "
            "than a retrained one: some of it may still be there."
        )
    missing: dict[str, list[str]] = {}
    for name, attack in after.get("attacks", {}).items():
        for figure, reason in attack["reasons"].items():
            missing.setdefault(f"{figure.replace('_', ' ')}: {reason}", []).append(name)
    for told, names in missing.items():
        words = ", ".join(name.replace("_", " ") for name in names)
        lines.append(f"Not computed, for the attacks {words}: {told}.")
    return lines


def attacks(report: Told) -> list[tuple[str, Told]]:
    """(name, description) of every attack of the final evaluation, the entropy attack first."""
    after = report["scores"].get("after")
    if not isinstance(after, Mapping):
        return []
    found: Told = after.get("membership", {})
    first = [("entropy regression", found)] if found.get("rate") is not None else []
    return [*first, *((n, one) for n, one in after.get("attacks", {}).items() if one["figures"])]


def digests(report: Told) -> list[tuple[str, str]]:
    """(what, SHA-256) of the model before and after."""
    pairs = (("before", report["model_before"]), ("after", report["model_after"]))
    return [(f"model {when}", value) for when, value in pairs if value]


VERIFY = "python -m deepclean_hooks verify report.json CHECKPOINT"
VERIFY_BOTH = f"{VERIFY} --original CHECKPOINT_BEFORE"
