"""DeepClean: reset the weights that the forget set needs more than the retain set does, and
fine-tune them alone.

Shi, Ghalyan, Gourgoulias, Buford, Moran: "DeepClean: Machine Unlearning on the Cheap by Resetting
Privacy Sensitive Weights using the Fisher Diagonal".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepclean_hooks import shards
from deepclean_hooks.measurement import Measurement
from deepclean_hooks.methods.method import Mask, Method, Selection
from deepclean_hooks.samples import Data

# An entry whose true gradient is 0 (an attention key bias: softmax does not see a shift) holds the
# rounding of terms that cancel: about eps of their size, eps^2 when squared. 8 eps leaves room for
# the terms of one sum.
NOISE_IN_EPS = 8.0

Parameters = str | tuple[str, ...] | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class DeepClean(Method):
    """W_f = {w : I_Df(w) > gamma * I_Dr(w)} becomes 0 and alone may train afterwards.

    `gamma`: 2.0 for a class, 1.1 for random samples (the paper's values). By product, so 0/0 stays,
    x/0 is selected and a tie stays. `one_dimensional`: whether norm scales, norm shifts and biases
    may be selected too, the paper's literal reading: a channel whose BatchNorm scale and shift are
    both 0 gets gradient 0 behind a ReLU for ever (51 % of W_f dead on a CIFAR-10 ResNet-20, class
    0, gamma 2; 0 % without). `parameters`: which parameters may be selected, a name pattern as in a
    shell (`"layer4.*"`), several, or a predicate of (name, parameter); all by default.

    gamma="auto" has the session try 1 to 10 on copies of the model and take the one that comes
    closest to what a retrained model would show; for anything but whole classes that needs
    `held_out`, data of the same kind that are neither training nor test data. See
    `deepclean_hooks.gamma_auto`.
    """

    gamma: float | Literal["auto"] = 2.0
    one_dimensional: bool = False
    parameters: Parameters | None = None
    held_out: Data | None = field(default=None, repr=False, compare=False)
    name = "deepclean"
    knob = "gamma"
    sharded = True

    def __post_init__(self) -> None:
        """Raises ValueError unless gamma is a positive number or "auto"."""
        gamma = self.gamma
        if gamma == "auto":
            return
        number = isinstance(gamma, int | float) and not isinstance(gamma, bool)
        if not number or not math.isfinite(gamma) or gamma <= 0:
            raise ValueError(
                f'gamma must be a positive number or "auto", got {gamma!r}; the paper uses 2.0 for '
                "a class and 1.1 for random samples"
            )
        if self.held_out is not None:
            raise ValueError(
                f'held_out serves to choose gamma, which is {gamma!r}; pass gamma="auto", or leave '
                "held_out away"
            )

    @property
    def number(self) -> float:
        """gamma; raises ValueError while it is "auto" and nothing has chosen it."""
        if isinstance(self.gamma, str):
            raise ValueError(
                'gamma="auto" needs the model and the data: run it in a session, or take '
                "choose_gamma(model, forget, retain).method"
            )
        return self.gamma

    def settings(self) -> dict[str, Any]:
        """gamma and which parameters may be selected."""
        return {name: value for name, value in super().settings().items() if name != "held_out"}

    def may_select(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether entries of this parameter may be selected."""
        if parameter.dim() <= 1 and not self.one_dimensional:
            return False
        if self.parameters is None:
            return True
        if callable(self.parameters):
            return bool(self.parameters(name, parameter))
        patterns = (self.parameters,) if isinstance(self.parameters, str) else self.parameters
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """The entries with I_Df > gamma * I_Dr that are not mere rounding noise on the forget
        side."""
        above = exceeds(forget, retain, self.number)
        return above_noise(above, forget, f"I_Df > {self.number:g} * I_Dr")

    def new_values(
        self,
        weights: Mapping[str, Tensor],
        selection: Selection,
        forget: Measurement,
        retain: Measurement,
    ) -> dict[str, Tensor]:
        """Zero."""
        return {name: torch.zeros_like(weights[name]) for name in selection.masks}

    def free(self, selection: Selection) -> Mask:
        """W_f itself."""
        return selection.masks


def exceeds(one: Measurement, other: Measurement, factor: float) -> Mask:
    """True where I_one > factor * I_other, compared by product: no division, no epsilon."""
    # S/n > factor * T/m  <=>  S * m > factor * T * n: one rounding fewer, and counts are exact in
    # float64.
    return {
        name: total * other.count > factor * other.sums[name] * one.count
        for name, total in one.sums.items()
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
