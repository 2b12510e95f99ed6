"""Membership inference in the style of DeepClean and SSD: does an attacker take the forgotten
samples for members?

The paper names the attacker, a logistic regression, and not the feature it sees. Here, as in SSD's
public code, that is the entropy of the softmax output, and the two classes of the fit are balanced.
"""

from __future__ import annotations

import torch

from deepclean_hooks.metrics.attack import Attack, lacking
from deepclean_hooks.metrics.outputs import Outputs


def entropy_regression(outputs: dict[str, Outputs]) -> Attack:
    """The share of forget samples that an attacker who knows retain and test samples calls members.

    `attacker_accuracy`: how often he is right, balanced, on what he was fitted on; near 50 he tells
    members from non-members no better than a coin, and `rate` means little.
    """
    attack = Attack(
        feature="entropy of the softmax output (natural logarithm), unscaled",
        attacker='sklearn.linear_model.LogisticRegression(class_weight="balanced")',
        fitted_on="retain (members) against test (non-members)",
        orientation="rate: per cent of the forget samples that the attacker calls members of the "
        "training set; forgetting brings it towards the figure of a model trained without them, "
        "which need not be 0; attacker_accuracy: per cent of the samples it was fitted on, 50 is a "
        "coin",
    )
    if missing := lacking(outputs, "forget", "retain", "test"):
        return attack.without("rate", f"it needs forget, retain and test; missing: {missing}")

    def run() -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression

        retain, test, forget = (outputs[name].entropy for name in ("retain", "test", "forget"))
        members = torch.cat([torch.ones(len(retain)), torch.zeros(len(test))]).numpy()
        known = torch.cat([retain, test]).unsqueeze(1).numpy()  # (N, 1)
        regression = LogisticRegression(class_weight="balanced").fit(known, members)
        right = regression.predict(known) == members
        sides = (right[members == 1].mean(), right[members == 0].mean())
        called = regression.predict(forget.unsqueeze(1).numpy()) == 1
        return {
            "rate": 100 * float(called.mean()),
            "attacker_accuracy": 50 * float(sides[0] + sides[1]),
        }

    return attack.tried("rate", run)
