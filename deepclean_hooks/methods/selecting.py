"""Selections and what they are made of: comparisons of two measurements, rounding noise, the
largest scores. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.ranks import shards

# An entry whose true gradient is 0 (an attention key bias: softmax does not see a shift) holds the
# rounding of terms that cancel: about eps of their size, eps^2 when squared. 8 eps leaves room for
# the terms of one sum.
NOISE_IN_EPS = 8.0

Mask = dict[str, Tensor]
"""Parameter name -> bool tensor of its shape; a parameter that is not named is False throughout."""

Weights = Mapping[str, Tensor]
"""Parameter name -> values of its shape."""


@dataclass(frozen=True)
class Selection:
    """The entries that a method picked, W_f, and how many it passed over.

    `candidates`: entries that could have been picked; `held_back`: entries that the criterion
    picked but that hold only rounding noise; `criterion`: in words, for the report; `advice`: what
    the user is warned of before anything is reset, empty for nothing.
    """

    masks: Mask
    candidates: int
    criterion: str
    held_back: int = 0
    held_back_by_layer: dict[str, int] = field(default_factory=dict)
    advice: str = ""

    @classmethod
    def of_all(cls, masks: Mask, criterion: str) -> Selection:
        """The selection whose candidates are all entries of the masks."""
        return cls(masks, sum(mask.numel() for mask in masks.values()), criterion)

    def entries(self) -> int:
        """How many were picked; of a sharded model on all ranks together, which all call this."""
        return sum(shards.total(mask) for mask in self.masks.values())


def is_norm_scale(name: str, parameter: Tensor) -> bool:
    """Whether this is the length of the rows of a weight that torch's weight_norm keeps apart: g in
    w = g v / |v|, (N, 1, ...)."""
    last = name.rsplit(".", 1)[-1]
    named = last == "original0" or (last.startswith("weight") and last.endswith("_g"))
    return named and sum(size > 1 for size in parameter.shape) <= 1


def exceeds(forget: Measurement, retain: Measurement, factor: float) -> Mask:
    """True where I_Df > factor * I_Dr, compared by product: no division, no epsilon."""
    # S/n > factor * T/m  <=>  S * m > factor * T * n: one rounding fewer, and counts are exact in
    # float64.
    return {
        name: total * retain.count > factor * retain.sums[name] * forget.count
        for name, total in forget.sums.items()
    }


def above_noise(above: Mask, forget: Measurement, criterion: str) -> Selection:
    """The selection of those entries above a criterion that are no rounding noise of `forget`."""
    noise = rounding_noise(forget)
    held = {name: shards.total(mask & noise[name]) for name, mask in above.items()}
    return Selection(
        masks={name: mask & ~noise[name] for name, mask in above.items()},
        candidates=sum(mask.numel() for mask in above.values()),
        criterion=criterion,
        held_back=sum(held.values()),
        held_back_by_layer={name: count for name, count in held.items() if count},
    )


def rounding_noise(diagonal: Measurement) -> Mask:
    """True where an entry is at most (8 eps)^2 of its tensor's largest, or its tensor of the
    model's largest.

    eps is that of the precision the gradients were computed in: 1.2e-7 in float32, so the floor is
    9.1e-13.
    """
    computed = getattr(torch, diagonal.settings.get("computed", "float32"))
    floor = (NOISE_IN_EPS * torch.finfo(computed).eps) ** 2
    largest = {n: shards.largest(t) if t.numel() else 0.0 for n, t in diagonal.sums.items()}
    model = max(largest.values(), default=0.0)
    return {
        name: total <= (floor * largest[name] if largest[name] > floor * model else model)
        for name, total in diagonal.sums.items()
    }


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where both are 0."""
    return torch.where(part == 0, torch.zeros_like(part), part / whole)


def largest(scores: Mapping[str, Tensor], share: float) -> Mask:
    """True for the largest `share` of all entries together, ties at the threshold in."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    count = max(1, round(share * flat.numel()))
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    return {name: score >= threshold for name, score in scores.items()}


def nothing(measurement: Measurement) -> Mask:
    """False for every entry that was measured."""
    return {
        n: torch.zeros(t.shape, dtype=torch.bool, device=t.device)
        for n, t in measurement.sums.items()
    }


def everything(like: Mapping[str, Tensor]) -> Mask:
    """True for every entry of these tensors."""
    return {n: torch.ones(t.shape, dtype=torch.bool, device=t.device) for n, t in like.items()}
