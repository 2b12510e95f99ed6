"""SalUn: random labels, and only the weights that the forget set's gradient picks may train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.measure.batch_mean import MeanGradient
from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.baselines.random_label import Drawn
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Mask, Selection, largest
from deepclean_hooks.methods.settings import require_shares
from deepclean_hooks.methods.training import Training


@dataclass(frozen=True)
class SalUn(Method):
    """Random labels on the `share` of entries with the largest |d loss(D_f) / d theta|, over all.

    Fan, Liu, Zhang, Wong, Wei, Liu: "SalUn: Empowering Machine Unlearning via Gradient-based Weight
    Saliency", ICLR 2024, equations 3 to 5; share 0.5, SGD 0.013, momentum 0.9, weight decay 5e-4,
    batches of 256, 10 epochs there. Its code masks gradients, which weight decay and momentum pass
    by (and puts weights back since 2025); here the others keep their bits. Nothing is reset.
    """

    share: float = 0.5
    seed: int = 0
    name = "salun"
    effect = "left as they were, to be trained"
    measured_by = MeanGradient()
    retain_measured_by = SamplesOnly()
    own_training = True

    def __post_init__(self) -> None:
        """Raises ValueError unless share is above 0 and at most 1."""
        require_shares(share=self.share)

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """The most salient entries; their values stay."""
        masks = largest({name: total.abs() for name, total in forget.sums.items()}, self.share)
        total = sum(mask.numel() for mask in masks.values())
        criterion = f"|d loss(D_f)| is among the largest {self.share:.0%} (trained, not reset)"
        return Selection(masks, total, criterion)

    def free(self, selection: Selection) -> Mask:
        """The salient entries."""
        return selection.masks

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """As RandomLabel."""
        return Drawn(loss_fn, self.seed)
