"""Membership inference by a number for each sample: each attack with its feature, its attacker,
what it was fitted on and which way its figures point.

N: samples. In every attack members are 1 and non-members 0, and a score is higher for a member.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deepclean_hooks.metrics.outputs import Outputs

FEW = 2  # samples of a side that an attack needs
# Samples a side for the SVC, whose time grows with their square: 14 s for 10,000, 0.4 s for 1,000,
# which weighted by 10 gave the same efficacy (30.8 instead of 30.7 %; unweighted 27.7 %).
MOST_FITTED = 1000
LARGEST = 100.0  # nats: losses are clipped here, as in SCRUB's code
FOLDS = 5
NO_SKLEARN = 'scikit-learn is not installed; pip install "deepclean-hooks[evaluate]"'
FPR = {"tpr_at_1_percent_fpr": 0.01, "tpr_at_0.1_percent_fpr": 0.001}


@dataclass(frozen=True)
class Attack:
    """What one attack says of the forget set; `reasons` says why a figure is missing.

    `figures`: rates and accuracies in per cent, `auc` from 0 to 1. `roc`: (false positive rate,
    true positive rate) points for a plot, thinned.
    """

    feature: str
    attacker: str
    fitted_on: str
    orientation: str
    figures: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    roc: tuple[tuple[float, float], ...] = ()

    def without(self, figure: str, reason: str) -> Attack:
        """The attack with the reason why it has no figure."""
        return replace(self, reasons={figure: reason})

    def tried(self, figure: str, run: Callable[[], dict[str, float]]) -> Attack:
        """The attack with the figures that `run` returns, or, without scikit-learn, none."""
        try:
            return replace(self, figures=run())
        except ImportError:
            return self.without(figure, NO_SKLEARN)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {**vars(self), "roc": [list(point) for point in self.roc]}


def unseen_like(outputs: dict[str, Outputs]) -> tuple[Outputs | None, str]:
    """The test samples that resemble the forget set, and in words which they are (or why none).

    `forget_test` if there is one, else the test samples of the classes that occur in the forget
    set: an attacker would recognise samples of other classes by their class.
    """
    if "forget_test" in outputs:
        return outputs["forget_test"], "forget_test"
    if "test" not in outputs or "forget" not in outputs:
        missing = " and ".join(name for name in ("forget", "test") if name not in outputs)
        return None, f"it needs forget, and test or forget_test; missing: {missing}"
    labels, test = torch.unique(outputs["forget"].labels), outputs["test"]
    among = torch.isin(test.labels, labels)
    if not among.any():
        return None, "no test sample is of a class of the forget set; pass forget_test="
    return test.at(among), "the test samples of the forget set's classes"


def lacking(outputs: dict[str, Outputs], *names: str) -> str:
    """Which of these sets there are no outputs of, in words; empty for none."""
    return ", ".join(name for name in names if name not in outputs)


def confidence_svc(outputs: dict[str, Outputs]) -> Attack:
    """SalUn's "MIA-efficacy": the share of forget samples that a support vector machine calls
    non-members."""
    attack = Attack(
        feature="probability of the sample's true label",
        attacker='sklearn.svm.SVC(C=3, gamma="auto", kernel="rbf")',
        fitted_on="as many retain samples (members) as test samples (non-members); of more than "
        f"{MOST_FITTED} each, {MOST_FITTED} spread evenly over their sorted confidences and "
        "weighted to stand for all",
        orientation="per cent of the forget samples called non-members (1 - mean, as in the SalUn "
        "line of work): higher means forgotten; the aim is the figure of a retrained model",
    )
    if missing := lacking(outputs, "forget", "retain", "test"):
        return attack.without("efficacy", f"it needs forget, retain and test; missing: {missing}")

    def run() -> dict[str, float]:
        from sklearn.svm import SVC

        sides = [outputs[name].confidence for name in ("retain", "test")]
        whole = min(len(side) for side in sides)
        count = min(MOST_FITTED, whole)
        known = torch.cat([_thinned(side, count) for side in sides]).unsqueeze(1).numpy()
        members = torch.tensor([1, 0]).repeat_interleave(count).numpy()
        machine = SVC(C=3, gamma="auto", kernel="rbf")
        machine.fit(known, members, sample_weight=[whole / count] * len(members))
        called = machine.predict(outputs["forget"].confidence.unsqueeze(1).numpy())
        return {"efficacy": 100 * (1 - float(called.mean()))}

    return attack.tried("efficacy", run)


def loss_regression(outputs: dict[str, Outputs]) -> Attack:
    """The cross-validated accuracy with which the loss tells forget samples from unseen ones."""
    unseen, words = unseen_like(outputs)
    attack = Attack(
        feature=f"cross-entropy loss, clipped at {LARGEST:g} nats",
        attacker='sklearn.linear_model.LogisticRegression(class_weight="balanced")',
        fitted_on=f"the forget set against {words}; {FOLDS} folds, each scored by a fit on the "
        "other folds; folds are dealt out in the order of the losses, so that no seed matters",
        orientation="balanced accuracy in per cent on samples that it was not fitted on: 50 is "
        "best (forget samples look like unseen samples), 100 recognises every sample",
    )
    if unseen is None:
        return attack.without("accuracy", words)
    both = (outputs["forget"], unseen)
    sides = [side.loss.clamp(max=LARGEST).sort().values for side in both]
    folds = min(FOLDS, *(len(side) for side in sides))
    if folds < FEW:
        reason = f"it needs {FEW} samples a side; forget has {len(sides[0])}, unseen"
        return attack.without("accuracy", f"{reason} {len(sides[1])}")

    def run() -> dict[str, float]:
        return {"accuracy": _cross_validated(sides, folds)}

    return attack.tried("accuracy", run)


def _cross_validated(sides: list[Tensor], folds: int) -> float:
    from sklearn.linear_model import LogisticRegression

    values = torch.cat(sides).unsqueeze(1).numpy()
    members = torch.cat([torch.ones(len(sides[0])), torch.zeros(len(sides[1]))]).numpy()
    fold = torch.cat([torch.arange(len(side)) % folds for side in sides]).numpy()
    right = torch.empty(len(members), dtype=torch.bool)
    for held_out in range(folds):
        inside = fold == held_out
        model = LogisticRegression(class_weight="balanced")
        model.fit(values[~inside], members[~inside])
        hit = model.predict(values[inside]) == members[inside]
        right[torch.from_numpy(inside)] = torch.from_numpy(hit)
    sure = torch.from_numpy(members) == 1
    return 50 * float(right[sure].double().mean() + right[~sure].double().mean())


# name: (what the attacker looks at, the score of a sample, higher for a member)
THRESHOLDS: dict[str, tuple[str, Callable[[Outputs], Tensor]]] = {
    "loss": ("minus the cross-entropy loss", lambda o: -o.loss),
    "confidence": ("probability of the predicted class", lambda o: o.highest),
    "entropy": ("minus the entropy of the softmax output", lambda o: -o.entropy),
    "modified_entropy": ("minus the modified entropy", lambda o: -o.modified_entropy),
    "margin": ("logit of the true label minus logsumexp of the other logits", lambda o: o.margin),
}


def thresholds(outputs: dict[str, Outputs]) -> dict[str, Attack]:
    """One attack for each score in THRESHOLDS: whoever is above a threshold is called a member."""
    unseen, words = unseen_like(outputs)
    attacks = {}
    for name, (feature, score) in THRESHOLDS.items():
        attack = Attack(
            feature=feature,
            attacker="a threshold on the feature",
            fitted_on=f"nothing: every threshold is tried, forget against {words}",
            orientation="auc: 0.5 is best, 1 means the forget samples are known as members, and "
            "below 0.5 they stand out by looking less familiar than unseen ones; tpr: per cent "
            "of the forget samples called members while at most 1 (0.1) % of the unseen ones are",
        )
        if unseen is None:
            attacks[f"threshold_{name}"] = attack.without("auc", words)
        else:
            members, others = score(outputs["forget"]), score(unseen)
            attacks[f"threshold_{name}"] = ranked(attack, members, others)
    return attacks


def ranked(attack: Attack, members: Tensor, others: Tensor) -> Attack:
    """The attack with AUC, TPR at low FPR and ROC of its scores, (N,) each, higher for members."""
    reasons = {
        name: f"a false positive rate of {rate:.1%} needs {round(1 / rate)} non-members, there are "
        f"{len(others)}"
        for name, rate in FPR.items()
        if len(others) * rate < 1
    }
    points: list[tuple[float, float]] = []

    def run() -> dict[str, float]:
        from sklearn.metrics import auc, roc_curve

        scores = torch.nan_to_num(torch.cat([members, others])).numpy()
        truth = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).numpy()
        false, true, _ = roc_curve(truth, scores)
        points.extend(zip(_points(false, false), _points(true, false), strict=True))
        rates = {
            name: 100 * float(true[false <= rate].max())
            for name, rate in FPR.items()
            if name not in reasons
        }
        return {"auc": float(auc(false, true)), **rates}

    done = attack.tried("auc", run)
    if not done.figures:
        return done
    return replace(done, reasons=reasons, roc=tuple(points))


def _points(values: Any, grid: Any, most: int = 60) -> list[float]:
    """At most `most` of the values, spread evenly over the curve."""
    step = max(1, -(-len(grid) // most))
    kept = [*values[::step], values[-1]]
    return [round(float(value), 5) for value in kept]


def _thinned(values: Tensor, count: int) -> Tensor:
    """`count` of the values, at evenly spaced ranks: the same whatever their order."""
    at = (torch.arange(count) * 2 + 1) * len(values) // (2 * count)
    return values.sort().values[at]
