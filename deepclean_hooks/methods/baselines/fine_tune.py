"""Fine-tuning on the retain set with every weight free: the baseline that resets nothing."""

from __future__ import annotations

from dataclasses import dataclass

from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.methods.method import Method


@dataclass(frozen=True)
class FineTune(Method):
    """Nothing is reset and everything may train, on the retain set, by your loop.

    As in DeepClean's tables with the recipe of `unlearn`; `PUBLISHED` has other recipes.
    """

    name = "fine-tune"
    measured_by = SamplesOnly()
