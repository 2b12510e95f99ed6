"""The gamma that is chosen, the trials it is chosen from, and by which rule."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepclean_hooks.methods.method import Method

BUDGET = 10.0  # percentage points of retain accuracy that a trial may lose

RULE = (
    "of the gammas that, reset and trained for a moment on a slice of the retain set, lose at most "
    f"{BUDGET:g} percentage points of retain accuracy, the one whose accuracies are on average "
    "closest to those expected of a retrained model: on forget samples of classes that the retain "
    "set does not hold 0, on the others what the original has on held-out samples of their "
    "classes, on held-out and retain samples what the original has; the largest of equals"
)


@dataclass(frozen=True)
class Behaviour:
    """How a model meets the sets; accuracies in per cent, losses in nats a sample.

    `new_class_accuracy`: on the forget samples whose class the retain set does not hold;
    `forget_accuracy` and `forget_loss`: on the others; `held_out_accuracy` and `held_out_loss`: on
    held-out samples of the others' classes, with the standard errors of the two differences. None
    where there are no such samples. `retain_accuracy`: on retain samples that no trial trains on.
    """

    retain_accuracy: float
    new_class_accuracy: float | None = None
    forget_accuracy: float | None = None
    forget_loss: float | None = None
    held_out_accuracy: float | None = None
    held_out_loss: float | None = None
    accuracy_error: float | None = None
    loss_error: float | None = None

    def distance(self, original: Behaviour) -> float:
        """The mean distance of these accuracies, in percentage points, to those that a retrained
        model is expected to have."""
        pairs = [
            (self.retain_accuracy, original.retain_accuracy),
            (self.new_class_accuracy, 0.0),
            (self.forget_accuracy, original.held_out_accuracy),
            (self.held_out_accuracy, original.held_out_accuracy),
        ]
        return statistics.fmean(
            abs(own - aim) for own, aim in pairs if own is not None and aim is not None
        )

    def as_unseen(self, classes: int) -> bool:
        """Whether the forget samples are met as data that were never trained on: of new classes at
        most half of chance is right, and the others are no better known than held-out ones, up to
        one standard error of the difference, by accuracy and by loss."""
        if self.new_class_accuracy is not None and self.new_class_accuracy > 50 / classes:
            return False
        if self.forget_accuracy is None:
            return True
        assert self.forget_loss is not None
        assert self.held_out_accuracy is not None
        assert self.held_out_loss is not None
        assert self.accuracy_error is not None
        assert self.loss_error is not None
        return (
            self.forget_accuracy <= self.held_out_accuracy + self.accuracy_error
            and self.forget_loss >= self.held_out_loss - self.loss_error
        )


@dataclass(frozen=True)
class GammaTrial:
    """One gamma of the grid: the size of W_f, how the model then met the sets, how far that is
    from what is expected of a retrained model, and whether it met D_f as unseen data."""

    gamma: float
    selected_entries: int
    behaviour: Behaviour
    distance: float
    as_unseen: bool


@dataclass(frozen=True)
class GammaChoice:
    """The gamma chosen, why, and the trials in rising order of gamma; `original`: the model as it
    was; `method`: the method with this gamma."""

    method: Method
    trials: tuple[GammaTrial, ...]
    original: Behaviour
    reason: str
    met: bool
    rule: str = RULE

    @property
    def gamma(self) -> float:
        """The number."""
        return self.method.number

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for the report."""
        return {
            "gamma": self.gamma,
            "rule": self.rule,
            "met": self.met,
            "reason": self.reason,
            "original": dataclasses.asdict(self.original),
            "trials": [dataclasses.asdict(one) for one in self.trials],
        }

    def __str__(self) -> str:
        """The reason and a line for each gamma."""
        lines = [f"gamma {self.gamma:g}: {self.reason}"]
        for one in self.trials:
            figures = dataclasses.asdict(one.behaviour).items()
            told = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in figures if v is not None)
            known = "as unseen" if one.as_unseen else "still known"
            lines.append(
                f"  {one.gamma:g}: {one.selected_entries} entries, distance {one.distance:.2f}, "
                f"{known}; {told}"
            )
        return "\n".join(lines)


def verdict(tried: Sequence[GammaTrial], original: Behaviour) -> tuple[int, str]:
    """(position of the trial taken, why), from trials in rising order of gamma."""
    least = original.retain_accuracy - BUDGET
    affordable = [i for i, one in enumerate(tried) if one.behaviour.retain_accuracy >= least]
    if not affordable:
        best = max(range(len(tried)), key=lambda i: tried[i].behaviour.retain_accuracy)
        return best, (
            f"every gamma of the grid cost more than {BUDGET:g} points of retain accuracy; this "
            "one the least: set an upper limit, DeepClean(..., max_selected=0.05), or train longer"
        )
    best = min(affordable, key=lambda i: (tried[i].distance, -tried[i].gamma))
    told = "the closest to what is expected of a retrained model"
    if tried[best].as_unseen:
        return best, told
    return best, f"{told}, but D_f was still better known than unseen data in its trial"
