"""Membership inference in the style of DeepClean and SSD: does an attacker take the forgotten
samples for members?

The paper names the attacker, a logistic regression, and not the feature it sees. Here, as in SSD's
public code, that is the entropy of the softmax output, and the two classes of the fit are balanced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEATURE = "entropy of the softmax output (natural logarithm), unscaled"
ATTACKER = 'sklearn.linear_model.LogisticRegression(class_weight="balanced")'
FITTED_ON = "retain (members) against test (non-members)"
ORIENTATION = (
    "per cent of the forget samples that the attacker calls members of the training set; "
    "forgetting brings it towards the figure of a model trained without them, which need not be 0"
)


@dataclass(frozen=True)
class Membership:
    """What a membership attack says of the forget set, and how it was made; `reason` says why
    `rate` is None.

    `rate` is in per cent. `attacker_accuracy`: the balanced accuracy, in per cent, of the attacker
    on the samples it was fitted on; near 50 it tells members from non-members no better than a
    coin, and `rate` means little.
    """

    rate: float | None = None
    attacker_accuracy: float | None = None
    reason: str | None = None
    feature: str = FEATURE
    attacker: str = ATTACKER
    fitted_on: str = FITTED_ON
    orientation: str = ORIENTATION


def entropy_attack(*, retain: Tensor, test: Tensor, forget: Tensor) -> Membership:
    """Fits the attacker on the entropies (N,) of retain and test, and applies it to those of the
    forget set."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return Membership(
            reason='scikit-learn is not installed; pip install "deepclean-hooks[evaluate]"'
        )
    members = torch.cat([torch.ones(len(retain)), torch.zeros(len(test))]).numpy()
    known = torch.cat([retain, test]).unsqueeze(1).numpy()  # (N, 1)
    attacker = LogisticRegression(class_weight="balanced").fit(known, members)
    right = attacker.predict(known) == members
    sides = (right[members == 1].mean(), right[members == 0].mean())
    called = attacker.predict(forget.unsqueeze(1).numpy()) == 1
    return Membership(
        rate=100 * float(called.mean()), attacker_accuracy=50 * float(sides[0] + sides[1])
    )
