"""DeepClean with one thing changed: the ablations of the tables, each a method of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepclean_hooks import BatchMean, DeepClean, Method
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods import Mask, Selection
from deepclean_hooks.methods.selecting import everything, ratio
from deepclean_hooks.methods.teachers import fresh


@dataclass(frozen=True)
class ZeroOnly(DeepClean):
    """W_f becomes 0 and nothing is trained: the paper's Table 4."""

    name = "zero only"

    def free(self, selection: Selection) -> Mask:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class AllFree(DeepClean):
    """W_f becomes 0, and then everything trains, W_r and one-dimensional parameters too."""

    name = "zero, train all"

    def may_select(self, name: str, parameter: nn.Parameter) -> bool:
        """All of them may train."""
        return True

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """As DeepClean, which leaves one-dimensional parameters out."""
        found = super().select(forget, retain)
        masks = {n: m if m.dim() > 1 else torch.zeros_like(m) for n, m in found.masks.items()}
        return Selection(masks, sum(m.numel() for m in masks.values()), found.criterion)

    def free(self, selection: Selection) -> Mask:
        """Everything."""
        return everything(selection.masks)


@dataclass(frozen=True)
class Dampened(DeepClean):
    """W_f is multiplied by I_Dr / I_Df, as SSD does, instead of becoming 0."""

    name = "dampened"
    effect = "dampened"

    def new_values(
        self,
        weights: Mapping[str, Tensor],
        selection: Selection,
        forget: Measurement,
        retain: Measurement,
    ) -> dict[str, Tensor]:
        """The weights, dampened."""
        own, kept = forget.mean(), retain.mean()
        # NaN, of 0 / 0, is in entries that are not read.
        return {n: weights[n] * (kept[n] / own[n]).to(weights[n].dtype) for n in selection.masks}


@dataclass(frozen=True)
class ToInitialValues(DeepClean):
    """W_f gets the values of an untrained network instead of 0."""

    seed: int = 0
    name = "to initial values"

    def values(
        self, model: nn.Module, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """The parameters of an untrained network."""
        anew = dict(fresh(model, seed=self.seed).named_parameters())
        return {name: anew[name].detach() for name in selection.masks}


@dataclass(frozen=True)
class OfBatchMeans(DeepClean):
    """The squares of batches' mean gradients instead of the Fisher diagonal."""

    batch_size: int = 64
    seed: int = 0
    name = "of batch means"

    @property
    def measured_by(self) -> Estimator:
        """Squared mean gradients of shuffled batches."""
        return BatchMean(batch_size=self.batch_size, seed=self.seed)


@dataclass(frozen=True)
class Quota(DeepClean):
    """Every parameter gives the same share of its entries, those with the largest I_Df / I_Dr; the
    share is what gamma selects over all of them."""

    name = "quota"

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """The same share of each parameter."""
        found = super().select(forget, retain)
        chosen = sum(int(mask.sum()) for mask in found.masks.values())
        share = chosen / max(1, found.candidates)
        own, kept = forget.mean(), retain.mean()
        masks = {name: _highest(ratio(own[name], kept[name]), share) for name in own}
        criterion = f"I_Df / I_Dr is among the parameter's highest {share:.1%}"
        return Selection(masks, found.candidates, criterion)


@dataclass(frozen=True)
class Reselected(DeepClean):
    """W_f keeps its values: for rounds after the first, which only pick anew what may train."""

    name = "reselected"
    effect = "left as they were, to be trained"

    new_values = Method.new_values  # the weights as they are


def _highest(scores: Tensor, share: float) -> Tensor:
    """True for the highest share of the entries, exactly as many as that is."""
    count = round(share * scores.numel())
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(count).indices] = True
    return mask.view(scores.shape)
