"""SalUn: random labels, and only the weights that the forget set's gradient picks may train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.measure.batch_mean import MeanGradient
from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.baselines.random_label import DrawnLabels, InTurn
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Mask, Selection, largest
from deepclean_hooks.methods.settings import require_positive, require_shares
from deepclean_hooks.methods.term import Term
from deepclean_hooks.methods.training import Training


@dataclass(frozen=True)
class SalUn(Method):
    """RandomLabel on the `share` of entries with the largest |d loss(D_f) / d theta|, over all.

    Fan, Liu, Zhang, Wong, Wei, Liu: "SalUn: Empowering Machine Unlearning via Gradient-based Weight
    Saliency", ICLR 2024, equations 3 to 5. Its code masks gradients, which weight decay and
    momentum circumvent (and puts weights back since 2025); here the other entries keep their bits.
    Nothing is reset. `weight` and `as_published` are as in RandomLabel.
    """

    share: float = 0.5
    seed: int = 0
    weight: float | None = None
    as_published: bool = False
    name = "salun"
    effect = "left as they were, to be trained"
    measured_by = MeanGradient()
    retain_measured_by = SamplesOnly()

    def __post_init__(self) -> None:
        """Raises ValueError unless share is above 0 and at most 1, and the weight positive."""
        require_shares(share=self.share)
        if self.weight is not None:
            require_positive(weight=self.weight)

    @property
    def own_training(self) -> bool:
        """Whether the published order was asked for."""
        return self.as_published

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """The most salient entries; their values stay."""
        masks = largest({name: total.abs() for name, total in forget.sums.items()}, self.share)
        criterion = f"|d loss(D_f)| is among the largest {self.share:.0%} (trained, not reset)"
        return Selection.of_all(masks, criterion)

    def free(self, selection: Selection) -> Mask:
        """The salient entries."""
        return selection.masks

    def term(self) -> Term | None:
        """As RandomLabel."""
        return None if self.as_published else DrawnLabels(self.weight, self.seed)

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """As RandomLabel."""
        return InTurn(loss_fn, self.seed)
