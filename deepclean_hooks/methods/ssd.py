"""Selective Synaptic Dampening, and its loss-free and adaptive variants: weights that matter more
to the forget set than to all data are scaled down; nothing is trained.

Foster, Schoepf, Brintrup: "Fast Machine Unlearning Without Retraining Through Selective Synaptic
Dampening", AAAI 2024 (SSD). The same: "Loss-Free Machine Unlearning", ICLR 2024 tiny papers
(LFSSD). Schoepf, Foster, Brintrup: "Parameter-Tuning-Free Data Entry Error Unlearning with Adaptive
Selective Synaptic Dampening", 2024 (ASSD).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepclean_hooks.measure.batch_mean import BatchMean, OutputMagnitude
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.fisher import PerSampleFisher
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Mask, Selection, Weights, above_noise
from deepclean_hooks.methods.settings import require_positive
from deepclean_hooks.ranks import shards


@dataclass(frozen=True)
class SSD(Method):
    """theta becomes theta * min((lambda I_D / I_Df)^e, 1) where I_Df > alpha * I_D.

    I_D is of the whole training set, D = D_r + D_f, and all trainable parameters are measured,
    biases and norm scales too. I_Df = 0 is never selected; I_D = 0 < I_Df becomes 0. `alpha` 10,
    `dampening` (lambda) 1 and `exponent` 1 are the paper's for ResNet-18 (section 5; alpha 5 for a
    ViT and a class, 25 for a subclass). With these the worst class of CIFAR-10 is known to fall to
    12.5 % of retain accuracy.

    `estimator`: the exact Fisher diagonal, which holds rounding noise back as DeepClean does, or
    `BatchMean(batch_size=64)`, what the published code computes, for its numbers. With the exact
    Fisher I_Df <= |D| / |D_f| * I_D for every entry, so that alpha 10 cannot select anything for a
    tenth of the data, and is refused; squared means are far smaller over mixed batches than over
    batches of one class. `fine_tune`: whether the dampened entries may train afterwards; by
    default nothing may.
    """

    alpha: float = 10.0
    dampening: float = 1.0
    exponent: float = 1.0
    estimator: Estimator = field(default_factory=PerSampleFisher)
    fine_tune: bool = False
    name = "ssd"
    effect = "dampened"
    knob = "alpha"
    sharded = True

    def __post_init__(self) -> None:
        """Raises ValueError for a hyper-parameter that is no positive number."""
        require_positive(alpha=self.alpha, dampening=self.dampening, exponent=self.exponent)
        if not isinstance(self.estimator, PerSampleFisher | BatchMean):
            raise ValueError(
                f"estimator must be PerSampleFisher() or BatchMean(), got {self.estimator!r}; for "
                "absolute gradients of the output use LFSSD()"
            )

    @property
    def measured_by(self) -> Estimator:
        """The estimator that was asked for."""
        return self.estimator

    @property
    def joint(self) -> bool:
        """The published code walks D in mixed batches, which is no sum of two walks."""
        return isinstance(self.estimator, BatchMean)

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """The entries with I_Df > alpha * I_D.

        Raises ValueError for an alpha that no entry can exceed.
        """
        if not self.joint:
            self._require_within_reach(forget.count, forget.count + retain.count)
        return self._selection(forget, retain, self.alpha, f"I_Df > {self.alpha:g} * I_D")

    def new_values(
        self, weights: Weights, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """The weights, dampened."""
        gone, whole = forget.mean(), self._whole(forget, retain).mean()
        values = {}
        for name in selection.masks:
            factor = ((whole[name] * self.dampening) / gone[name]).pow(self.exponent)
            shards.local(factor).clamp_max_(1)  # torch 2.7 has no clamp of sharded tensors
            # In the weight's precision, as published; NaN (0 / 0) is in entries that are not read.
            values[name] = weights[name] * factor.to(weights[name].dtype)
        return values

    def free(self, selection: Selection) -> Mask:
        """Nothing, or the dampened entries."""
        return selection.masks if self.fine_tune else {}

    def _require_within_reach(self, gone: int, whole: int) -> None:
        if self.alpha * gone >= whole:
            raise ValueError(
                f"alpha={self.alpha:g} selects nothing: {gone} of {whole} samples are to be "
                f"forgotten, and I_D holds their part of I_Df, so I_Df <= {whole / gone:.4g} * I_D "
                "for the exact Fisher; lower alpha, use ASSD(), or "
                "SSD(estimator=BatchMean(batch_size=64, seed=0)), squared means of mixed batches, "
                "which the paper's alpha suits"
            )

    def _whole(self, forget: Measurement, retain: Measurement) -> Measurement:
        return retain if self.joint else retain + forget

    def _selection(
        self, forget: Measurement, retain: Measurement, alpha: float, criterion: str
    ) -> Selection:
        gone, whole = forget.mean(), self._whole(forget, retain).mean()
        masks = {name: gone[name] > whole[name] * alpha for name in gone}
        if not self.joint:
            return above_noise(masks, forget, criterion)
        return Selection.of_all(masks, criterion)


@dataclass(frozen=True)
class LFSSD(SSD):
    """SSD with the mean absolute gradient of ||f(x)||^2 as importance: needs no labels.

    `estimator`: batches of 64, as published; `OutputMagnitude(batch_size=1)` takes each sample's
    own gradient, does not depend on batches or order, and takes one backward pass a sample.
    """

    estimator: Estimator = field(default_factory=OutputMagnitude)
    name = "lfssd"

    def __post_init__(self) -> None:
        """Raises ValueError for a hyper-parameter that is no positive number."""
        require_positive(alpha=self.alpha, dampening=self.dampening, exponent=self.exponent)
        if not isinstance(self.estimator, OutputMagnitude):
            raise ValueError(f"estimator must be OutputMagnitude(), got {self.estimator!r}")

    @property
    def joint(self) -> bool:
        """As SSD in the published code."""
        return True


@dataclass(frozen=True)
class ASSD(SSD):
    """SSD with alpha such that the top ln(1 + 100 |D_f| / |D|) per cent of entries are selected.

    Entries are ranked by I_Df / I_D; 2.4 % for a forget set of 10 %, of those for which I_D > 0: an
    entry that no sample uses (0 / 0) has no rank, in the published code neither. There is nothing
    to choose; `alpha` is ignored by the rule and cannot be set.
    """

    alpha: float = field(default=math.nan, init=False)
    name = "assd"
    knob = ""
    sharded = False  # ranks the entries of all tensors

    def __post_init__(self) -> None:
        """Raises ValueError for a hyper-parameter that is no positive number."""
        require_positive(dampening=self.dampening, exponent=self.exponent)

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """The top entries by I_Df / I_D, ties at the threshold left out."""
        gone, whole = forget.mean(), self._whole(forget, retain).mean()
        rest = len(retain.samples) - (len(forget.samples) if self.joint else 0)
        share = len(forget.samples) / (len(forget.samples) + rest)
        per_cent = math.log(1 + 100 * share)
        used = {name: total > 0 for name, total in whole.items()}
        ratios = torch.cat([gone[name][here] / whole[name][here] for name, here in used.items()])
        most = round(ratios.numel() * per_cent / 100)
        if not most:
            return self._selection(forget, retain, math.inf, "nothing: the model is too small")
        # The entry after the last one selected; by product afterwards, as in SSD.
        at = max(1, ratios.numel() - most)
        alpha = float(ratios.kthvalue(at).values)
        return self._selection(
            forget, retain, alpha, f"I_Df > {alpha:.4g} * I_D, the top {per_cent:.3g} %"
        )
