"""What a report says, in words and rows, before it becomes a page: read from `Report.to_dict()`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from deepclean_hooks.report.small_sets import LEAST, WHY
from deepclean_hooks.report.stored_report import Document


@dataclass(frozen=True)
class Row:
    """One figure of the original, the unlearned and the gold models, and what to make of it.

    `within`: whether the gap is within what the gold models differ by; None where that is unknown.
    """

    name: str
    label: str
    meaning: str
    unit: str
    before: float | None = None
    after: float | None = None
    gold: float | None = None
    gap: float | None = None
    verdict: str = ""
    within: bool | None = None

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


class Figure(NamedTuple):
    """How a figure of an evaluation is shown; `compared`: also where methods stand side by side."""

    name: str
    label: str
    meaning: str
    unit: str = "%"
    compared: bool = False


FIGURES = (
    Figure(
        "retain.accuracy",
        "Accuracy, data kept",
        "how often the model is right on what it may keep; should stay high",
        compared=True,
    ),
    Figure(
        "test.accuracy",
        "Accuracy, new data",
        "how often it is right on data it never saw; should stay high",
        compared=True,
    ),
    Figure(
        "forget.accuracy",
        "Accuracy, forgotten data",
        "should be that of a model that never saw them, no higher and no lower",
        compared=True,
    ),
    Figure(
        "forget_test.accuracy",
        "Accuracy, new data like the forgotten",
        "unseen data of the same kind, such as the forgotten class",
    ),
    Figure(
        "forget.loss",
        "Loss, forgotten data",
        "how surprised the model is by the forgotten data",
        "",
    ),
    Figure(
        "attack.entropy_regression.rate",
        "Called training data (entropy)",
        "share of the forgotten data that an attacker takes for training data",
        compared=True,
    ),
    Figure(
        "attack.confidence_svc.efficacy",
        "Called new data (confidence)",
        "share of the forgotten data that an attacker takes for new data; higher is forgotten",
    ),
    Figure(
        "attack.loss_regression.accuracy",
        "Told from new data (loss)",
        "how often an attacker tells forgotten from new data: 50 % is guessing, and best",
        compared=True,
    ),
    Figure(
        "attack.threshold_loss.auc",
        "Told from new data (loss, AUC)",
        "0.5 is best; near 1 the forgotten data are recognised, near 0 they stand out as strange",
        "",
    ),
    Figure(
        "attack.rmia.auc",
        "Told from new data (RMIA, AUC)",
        "the same by an attacker who compares with retrained models",
        "",
        compared=True,
    ),
    Figure(
        "attack.rmia.tpr_at_1_percent_fpr",
        "Caught with 1 % false alarms (RMIA)",
        "share of the forgotten data that are recognised almost for sure; 1 % is guessing",
    ),
    Figure("probe", "Class still readable inside", "linear probe on the last features"),
    Figure("zrf", "ZRF", "likeness of the outputs to an untrained model's", ""),
    Figure(
        "attack.ulira.auc",
        "Told from retrained models (U-LiRA, AUC)",
        "by an attacker who has many models of either kind and looks at single samples; 0.5 is "
        "best",
        "",
    ),
    Figure(
        "relearn",
        "Steps to learn them again",
        "far fewer than a retrained model needs mean that they were hidden, not gone",
        "steps",
        compared=True,
    ),
    Figure(
        "klom",
        "Distance of margins (KLoM)",
        "of many unlearned models from retrained ones, sample by sample, in nats; 0 is the same",
        "",
    ),
)
PHASES = {
    "evaluate": "scoring",
    "fisher": "measuring",
    "choose gamma": "choosing gamma",
    "select": "selecting",
    "reset": "resetting",
    "dead": "looking for weights that cannot be trained",
    "fine-tune": "training",
}
VERIFY = "python -m deepclean_hooks verify report.json CHECKPOINT"
VERIFY_BOTH = f"{VERIFY} --original CHECKPOINT_BEFORE"


def score(report: Document, when: str) -> Document:
    """The evaluation `before` or `after`, empty where there is none."""
    evaluation = report["scores"].get(when)
    return evaluation if isinstance(evaluation, Mapping) else {}


def rows(report: Document) -> list[Row]:
    """The figures that a page shows, in order; those that neither evaluation has are left out."""
    return _rows(score(report, "before"), score(report, "after"))


def compared(evaluations: Mapping[str, Document]) -> dict[str, list[Row]]:
    """The rows by which methods are compared, for each method, that any of them has a figure of."""
    tables = {
        method: {row.name: row for row in _rows({}, evaluation)}
        for method, evaluation in evaluations.items()
    }
    shown = [
        figure
        for figure in FIGURES
        if figure.compared and any(figure.name in table for table in tables.values())
    ]
    return {
        method: [table.get(figure.name, Row(*figure[:4])) for figure in shown]
        for method, table in tables.items()
    }


def _rows(before: Document, after: Document) -> list[Row]:
    was, now = before.get("figures", {}), after.get("figures", {})
    spread, gaps = after.get("spread", {}), after.get("gaps", {})
    lines = []
    for figure in FIGURES:
        name = figure.name
        if name in was or name in now:
            gold = spread[name]["mean"] if name in spread else None
            row = Row(*figure[:4], was.get(name), now.get(name), gold, gaps.get(name))
            lines.append(_judged(row, after))
    return lines


def _judged(row: Row, after: Document) -> Row:
    spread = after.get("spread", {}).get(row.name)
    if spread is None or row.gap is None:
        return replace(row, verdict="nothing to compare with")
    within = after.get("within_spread", {}).get(row.name)
    if within is None:
        return replace(row, verdict="one retrained model only")
    width = spread["highest"] - spread["lowest"]
    words = f"{width:.1f} points" if row.unit == "%" else f"{width:.3f}"
    verdict = f"{'within' if within else 'beyond'} the spread ({words})"
    return replace(row, verdict=verdict, within=within)


def golds(report: Document) -> int:
    """How many gold models the final evaluation was compared with."""
    spread = score(report, "after").get("spread", {})
    return max((among["count"] for among in spread.values()), default=0)


def frozen(report: Document) -> int:
    """How many trainable entries were neither selected nor free to train."""
    return int((report["trainable_entries"] or 0) - (report["may_change_entries"] or 0))


def asked(report: Document) -> list[str]:
    """What was asked, in sentences."""
    settings = ", ".join(f"{name} = {value}" for name, value in report["settings"].items())
    lines = []
    if report["forget_samples"] is not None:
        lines.append(
            f"Forget {report['forget_samples']:,} training samples; keep what was learned from "
            f"{report['retain_samples']:,} others."
        )
    return [*lines, f"Method: {report['method']}" + (f" ({settings})." if settings else ".")]


def done(report: Document) -> list[str]:
    """What was done, in sentences; phases that have not happened are left out."""
    lines = []
    choice = report["gamma_choice"]
    if choice:
        tried = ", ".join(f"{trial['gamma']:g}" for trial in choice["trials"])
        lines.append(
            f"gamma = {choice['gamma']:g} was chosen out of {tried} without test data: "
            f"{choice['reason']}. Rule: {choice['rule']}."
        )
    if report["selected_entries"]:
        lines.append(
            f"{report['selected_entries']:,} of {report['trainable_entries']:,} weights "
            f"({100 * report['selected_fraction']:.1f} %) were selected and {report['effect']}. "
            f"Criterion: {report['criterion']}."
        )
    elif report["selected_entries"] is not None:
        lines.append("No weight was selected.")
    if report["optimizer_steps"]:
        lines.append(f"Training followed, in {report['optimizer_steps']:,} steps.")
    held, moved = frozen(report), report["frozen_entries_moved"]
    if moved is not None and held:
        lines.append(
            f"The {held:,} other weights were held: compared bit for bit at the end, "
            + ("none had changed." if not moved else f"{moved:,} HAD CHANGED.")
        )
    elif moved is not None:
        lines.append("No weight was held: every weight was free to train.")
    if report["seconds"]:
        spent = ", ".join(f"{PHASES.get(p, p)} {s:.1f} s" for p, s in report["seconds"].items())
        lines.append(f"Time: {spent}.")
    if report["phase"] != "finished":
        lines.append(f"The run is not finished: its phase is {report['phase']!r}.")
    return lines


def caveats(report: Document) -> list[str]:
    """What the figures do not show, in plain words."""
    count, after = golds(report), report["scores"].get("after")
    lines = [f"The run warned: {text}." for text in report["warnings"]]
    if isinstance(after, str):
        lines.append(f"The final scores were {after}.")
    lines += _withheld(report)
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
    lines += _of_the_outcome(score(report, "after"))
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


def _withheld(report: Document) -> list[str]:
    """What was left out because it tells of single samples, or what the page shows of them."""
    left_out = report.get("withheld", {})
    lines = []
    if left_out:
        small = ", ".join(left_out["sets"])
        classes = ", ".join(left_out["classes"])
        parts = [f"of the sets {small}"] if small else []
        parts += [f"of single classes of {classes}"] if classes else []
        lines.append(
            f"Losses, classes, distributions and attacks {' and '.join(parts)} are withheld: "
            f"figures of fewer than {left_out['least']} samples tell the class and the exact loss "
            "of single ones, by which they can be recognised. An auditor gets them with exact=True."
        )
    sets = score(report, "after").get("sets", {})
    least = min((of_set["count"] for of_set in sets.values() if "loss" in of_set), default=None)
    if least is not None and least < LEAST:
        lines.append(
            f"This page shows exact figures of a set of {least}: they tell the class and the loss "
            "of single samples, by which these can be recognised. Keep it from the public."
        )
    return lines


def _of_the_outcome(after: Document) -> list[str]:
    lines = []
    gap = after.get("gaps", {}).get("forget.accuracy", 0.0)
    within = after.get("within_spread", {}).get("forget.accuracy", False)
    if gap < -1 and not within:
        lines.append(
            f"The model is right on the forgotten data {-gap:.1f} percentage points less often "
            "than a retrained one: it forgot more than it should, which can be noticed."
        )
    if gap > 1 and not within:
        lines.append(
            f"The model is right on the forgotten data {gap:.1f} percentage points more often "
            "than a retrained one: some of it may still be there."
        )
    missing: dict[str, list[str]] = {}
    for name, attack in after.get("attacks", {}).items():
        for figure, reason in attack["reasons"].items():
            if reason == WHY:
                continue
            missing.setdefault(f"{figure.replace('_', ' ')}: {reason}", []).append(name)
    for figure, names in missing.items():
        words = ", ".join(name.replace("_", " ") for name in names)
        lines.append(f"Not computed, for the attacks {words}: {figure}.")
    return lines


def attacks(report: Document) -> list[tuple[str, Document]]:
    """(name in words, description) of every attack of the final evaluation that has figures."""
    return [
        (name.replace("_", " "), attack)
        for name, attack in score(report, "after").get("attacks", {}).items()
        if attack["figures"]
    ]


def digests(report: Document) -> list[tuple[str, str]]:
    """(what, SHA-256) of the model before and after."""
    pairs = (("before", report["model_before"]), ("after", report["model_after"]))
    return [(f"model {when}", value) for when, value in pairs if value]
