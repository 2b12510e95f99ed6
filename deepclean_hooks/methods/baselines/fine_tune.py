"""Fine-tuning on the retain set with every weight free: the baseline that resets nothing."""

from __future__ import annotations

from dataclasses import dataclass

from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.methods.method import Method


@dataclass(frozen=True)
class FineTune(Method):
    """Nothing is reset and everything may train, on the retain set, by your own loop.

    As in DeepClean's tables with the recipe of `unlearn` (Adam 1e-3, cosine, 3 epochs). Others:
    SGD 0.02, momentum 0.9, weight decay 5e-4, 5 epochs (Foster et al.'s code for SSD); SGD 0.01,
    the same momentum and decay, batches of 256, 10 epochs (Jia et al.; Fan et al.).
    """

    name = "fine-tune"
    measured_by = SamplesOnly()
