"""Fine-tuning on the retain set with every weight free: the baseline that resets nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepclean_hooks.measure.estimator import Estimator, SamplesOnly
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Mask, Method, Selection


@dataclass(frozen=True)
class FineTune(Method):
    """Nothing is reset and everything may train, on the retain set, by your own loop.

    As in DeepClean's tables with the recipe of `unlearn` (Adam 1e-3, cosine, 3 epochs). Others:
    SGD 0.02, momentum 0.9, weight decay 5e-4, 5 epochs (Foster et al.'s code for SSD); SGD 0.01,
    the same momentum and decay, batches of 256, 10 epochs (Jia et al.; Fan et al.).
    """

    name = "fine-tune"

    @property
    def measured_by(self) -> Estimator:
        """Nothing is measured."""
        return SamplesOnly()

    def may_select(self, name: str, parameter: nn.Parameter) -> bool:
        """All of them may train."""
        return True

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """No entry."""
        return Selection(nothing(forget), 0, "nothing is selected")

    def new_values(
        self,
        weights: Mapping[str, Tensor],
        selection: Selection,
        forget: Measurement,
        retain: Measurement,
    ) -> dict[str, Tensor]:
        """The weights as they are, of which nothing is read."""
        return {name: weights[name] for name in selection.masks}

    def free(self, selection: Selection) -> Mask:
        """Everything trainable."""
        return everything(selection.masks)


def nothing(measurement: Measurement) -> Mask:
    """False for every entry that was measured."""
    return {
        n: torch.zeros(t.shape, dtype=torch.bool, device=t.device)
        for n, t in measurement.sums.items()
    }


def everything(like: Mapping[str, Tensor]) -> Mask:
    """True for every entry of these tensors."""
    return {n: torch.ones(t.shape, dtype=torch.bool, device=t.device) for n, t in like.items()}
