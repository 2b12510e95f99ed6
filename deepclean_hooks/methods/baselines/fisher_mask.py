"""FisherMask: weights whose Fisher information is larger on the forget set become 0; all train."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.expected_fisher import ExpectedFisher
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Selection, Weights, largest
from deepclean_hooks.methods.settings import require_positive, require_shares


@dataclass(frozen=True)
class FisherMask(Method):
    """The `share` of weights with the largest F_f - F_r becomes 0, then everything is trained.

    Liu, Sun, Wu, Zhou: "Unlearning with Fisher Masking", 2023. The difference, not the ratio, of
    expected Fisher diagonals; in convolutions averaged over each kernel, so that kernels fall as a
    whole; biases and norms are not reset. Their code squares means of batches of 128; here each
    sample's gradient is squared.
    """

    classes: int
    share: float = 0.02
    name = "fisher mask"
    effect = "reset to 0"

    def __post_init__(self) -> None:
        """Raises ValueError unless share is above 0 and at most 1."""
        require_positive(classes=self.classes)
        require_shares(share=self.share)

    @property
    def measured_by(self) -> Estimator:
        """The Fisher diagonal with labels as the model expects them."""
        return ExpectedFisher(self.classes)

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """The largest differences among all weights of layers."""
        gone, kept = forget.mean(), retain.mean()
        scores = {
            name: _by_kernel(value - kept[name]) for name, value in gone.items() if value.dim() > 1
        }
        flat = {n: torch.zeros_like(v, dtype=torch.bool) for n, v in gone.items() if v.dim() <= 1}
        masks = {**largest(scores, self.share), **flat}
        total = sum(score.numel() for score in scores.values())
        return Selection(masks, total, f"I_Df - I_Dr is among the largest {self.share:.0%}")

    def new_values(
        self, weights: Weights, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """Zero."""
        return {name: torch.zeros_like(weights[name]) for name in selection.masks}


def _by_kernel(score: Tensor) -> Tensor:
    if score.dim() < 3:
        return score
    kernel = tuple(range(2, score.dim()))
    return score.mean(kernel, keepdim=True).expand_as(score).contiguous()
