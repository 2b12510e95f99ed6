"""DeepClean: reset the weights that the forget set needs more than the retain set does, and
fine-tune them alone.

Shi, Ghalyan, Gourgoulias, Buford, Moran: "DeepClean: Machine Unlearning on the Cheap by Resetting
Privacy Sensitive Weights using the Fisher Diagonal".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from deepclean_hooks.data.samples import Data
from deepclean_hooks.measure import classes
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.fisher import PerSampleFisher
from deepclean_hooks.measure.folds import FoldedDiagonal, FoldedFisher
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import (
    Mask,
    Selection,
    Weights,
    above_noise,
    exceeds,
    is_norm_scale,
    nothing,
    rounding_noise,
)
from deepclean_hooks.methods.settings import is_positive, require_shares
from deepclean_hooks.ranks import shards

CAREFUL_GAMMA = 2.0  # the paper's for a class
CAREFUL_PARTS = 3
CAREFUL_SHARE = 0.1  # of the entries that may be selected
FEW = 1000  # forget samples below which a literal selection is warned of

Parameters = str | tuple[str, ...] | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class DeepClean(Method):
    """W_f = {w : I_Df(w) > gamma * I_Dr(w)} becomes 0 and alone may train afterwards.

    `gamma`: a number is the paper's method word for word, where 2.0 is for a class and 1.1 for
    random samples. By product, so 0/0 stays, x/0 is selected and a tie stays. The default,
    "careful", is gamma 2 for at most a tenth of the entries; and where the retain set still holds
    classes of the forget set, I_Df > 2 * I_Dr must hold in each of three parts of D_f. Of few
    samples the ratio is mostly chance: gamma 2 selected 31 % of a ResNet-20 for one draw of 50
    random samples and nothing for another; with three parts nothing for either.

    `one_dimensional`: whether norm scales, norm shifts and biases may be selected too, the paper's
    literal reading: a channel whose BatchNorm scale and shift are both 0 gets gradient 0 behind a
    ReLU for ever (62 to 84 % of W_f dead on a CIFAR-10 ResNet-8, class 0, gamma 2, three seeds; 5
    to 12 % without). `parameters`: which parameters may be selected, a name pattern as in a shell
    (`"layer4.*"`), several, or a predicate of (name, parameter); all by default.

    `max_selected`: at most this share of the entries that may be selected, above 0 and at most 1;
    where gamma takes more, it is raised to the least value that keeps to it, and the report's
    criterion says to which. One gamma resets 1 % of a network for one class and half of it for
    another, which no short fine-tune repairs.

    gamma="auto" has the session try 1 to 10 on copies of the model and take the one that comes
    closest to what a retrained model would show; for anything but whole classes that needs
    `held_out`, data of the same kind that are neither training nor test data. See
    `deepclean_hooks.tuning.gamma_auto`.
    """

    gamma: float | Literal["careful", "auto"] = "careful"
    one_dimensional: bool = False
    parameters: Parameters | None = None
    max_selected: float | None = None
    held_out: Data | None = field(default=None, repr=False, compare=False)
    name = "deepclean"
    effect = "reset to 0"
    knob = "gamma"
    sharded = True

    def __post_init__(self) -> None:
        """Raises ValueError unless gamma is positive, "careful" or "auto", and
        max_selected a share; TypeError for `parameters` of another kind."""
        gamma, patterns = self.gamma, self.parameters
        listed = isinstance(patterns, tuple | list) and all(isinstance(p, str) for p in patterns)
        if not (patterns is None or isinstance(patterns, str) or callable(patterns) or listed):
            raise TypeError(
                "parameters must be a name pattern such as 'layer4.*', several, or a predicate of "
                f"(name, parameter), got {patterns!r}"
            )
        if self.max_selected is not None:
            require_shares(max_selected=self.max_selected)
        if gamma == "auto":
            return
        if gamma != "careful" and not is_positive(gamma):
            raise ValueError(
                f'gamma must be a positive number, "careful" or "auto", got {gamma!r}; the paper '
                "uses 2.0 for a class and 1.1 for random samples"
            )
        if self.held_out is not None:
            raise ValueError(
                f'held_out serves to choose gamma, which is {gamma!r}; pass gamma="auto", or leave '
                "held_out away"
            )

    @property
    def number(self) -> float:
        """gamma, 2 where it is "careful"; raises ValueError while it is "auto" and nothing has
        chosen it."""
        if self.gamma == "careful":
            return CAREFUL_GAMMA
        if isinstance(self.gamma, str):
            raise ValueError(
                'gamma="auto" needs the model and the data: run it in a session, or take '
                "choose_gamma(model, forget, retain).method"
            )
        return self.gamma

    def at(self, number: float) -> DeepClean:
        """The same with this gamma, which needs no held-out data any more."""
        return dataclasses.replace(self, gamma=number, held_out=None)

    @property
    def is_open(self) -> bool:
        """Whether gamma is "auto"."""
        return self.gamma == "auto"

    @property
    def trial_data(self) -> Data | None:
        """`held_out`."""
        return self.held_out

    @property
    def measured_by(self) -> Estimator:
        """The exact Fisher diagonal, of parts of the forget set too where gamma is "careful"."""
        return FoldedFisher(CAREFUL_PARTS) if self.gamma == "careful" else PerSampleFisher()

    @property
    def retain_measured_by(self) -> Estimator:
        """The exact Fisher diagonal."""
        return PerSampleFisher()

    def may_select(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether entries of this parameter may be selected."""
        flat = parameter.dim() <= 1 or is_norm_scale(name, parameter)
        if flat and not self.one_dimensional:
            return False
        if self.parameters is None:
            return True
        if callable(self.parameters):
            return bool(self.parameters(name, parameter))
        patterns = (self.parameters,) if isinstance(self.parameters, str) else self.parameters
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """The entries with I_Df > gamma * I_Dr that are not mere rounding noise on the forget side.

        Raises ValueError for "careful" where the forget set cannot be parted though it must be.
        """
        common = classes.shared(forget.settings.get("classes"), retain.settings.get("classes"))
        if self.gamma != "careful":
            selection = self._limited(forget, forget, retain, self.max_selected)
        else:
            share = CAREFUL_SHARE if self.max_selected is None else self.max_selected
            if common == []:
                return self._limited(forget, forget, retain, share)
            selection = self._careful(forget, retain, share)
        advice = selection.advice or _of_chance(forget, common, selection)
        return dataclasses.replace(selection, advice=advice)

    def _careful(self, forget: Measurement, retain: Measurement, share: float) -> Selection:
        """The entries that exceed gamma times the retain set's in each part of the forget set."""
        if not isinstance(forget, FoldedDiagonal):
            raise TypeError(
                'gamma="careful" compares parts of the forget set, and this diagonal is of the '
                "whole; measure it with FoldedFisher(), or give gamma a number"
            )
        if not forget.lowest and forget.count > 1:
            raise ValueError(
                'gamma="careful" compares parts of the forget set, which is a stream and cannot be '
                "parted; pass a Dataset with a length, or give gamma a number"
            )
        if not forget.lowest:
            why = "nothing: of a single sample all is chance"
            return Selection.of_all(nothing(forget), why)
        selection = self._limited(forget.of_lowest(), forget, retain, share)
        criterion = f"{selection.criterion}, in each of {forget.parts} parts of D_f"
        return dataclasses.replace(selection, criterion=criterion)

    def _limited(
        self, compared: Measurement, forget: Measurement, retain: Measurement, share: float | None
    ) -> Selection:
        """The entries whose `compared` information exceeds gamma times that of the retain set, at
        most that share of them."""
        literal = _selected(compared, forget, retain, self.number)
        if share is None:
            return literal
        most = math.floor(share * literal.candidates)
        if literal.entries() <= most:
            return literal
        least = _least_gamma(compared, forget, retain, self.number, most)
        raised = _selected(compared, forget, retain, least)
        why = f"raised from {self.number:g} to select at most {share:.3g} of them"
        advice = "" if raised.entries() else _of_limit(share, literal)
        return dataclasses.replace(raised, criterion=f"{raised.criterion}, {why}", advice=advice)

    def new_values(
        self, weights: Weights, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """Zero."""
        return {name: torch.zeros_like(weights[name]) for name in selection.masks}

    def free(self, selection: Selection) -> Mask:
        """W_f itself."""
        return selection.masks


def _selected(
    compared: Measurement, forget: Measurement, retain: Measurement, gamma: float
) -> Selection:
    return above_noise(exceeds(compared, retain, gamma), forget, f"I_Df > {gamma:g} * I_Dr")


def _of_limit(share: float, literal: Selection) -> str:
    """What to say where a limit leaves nothing of a selection."""
    return (
        f"nothing was selected: gamma takes {literal.entries()} entries, and max_selected={share!r}"
        f" of {literal.candidates} allows {math.floor(share * literal.candidates)}, or fewer than "
        "have the same ratio; raise max_selected"
    )


def _of_chance(forget: Measurement, common: list[str] | None, selection: Selection) -> str:
    """What to say of a selection for samples of classes that the retain set still holds."""
    if not common:
        return ""
    way_out = (
        "ReferenceGuided(held_out=...) forgets such samples by the answers that unseen data get"
    )
    count = f"{forget.count} forget samples of {len(common)} classes that the retain set holds too"
    if isinstance(forget, FoldedDiagonal):
        if selection.entries():
            return ""
        return (
            f"nothing was selected: for {count}, no weight serves D_f more in each of "
            f"{CAREFUL_PARTS} parts of it, so what a reset would hit is chance; {way_out}"
        )
    if forget.count >= FEW or not selection.entries():
        return ""
    return (
        f"{selection.entries() / max(1, selection.candidates):.1%} of the candidate entries are "
        f"reset for {count}: of so few samples the ratio is mostly chance, and the reset costs "
        f'accuracy; {way_out}, or leave gamma at "careful"'
    )


def _least_gamma(
    compared: Measurement, forget: Measurement, retain: Measurement, gamma: float, most: int
) -> float:
    """The least gamma, to 1 part in a million, that selects at most so many entries.

    By halving, because every rank of a sharded model can count its own entries. Raises ValueError
    if even an unbounded gamma selects more: entries that the retain set does not use at all.
    """

    noise = rounding_noise(forget)

    def fits(tried: float) -> bool:
        above = exceeds(compared, retain, tried)
        return sum(shards.total(mask & ~noise[name]) for name, mask in above.items()) <= most

    low, growth = gamma, 2.0
    while not fits(gamma * growth):
        low, growth = gamma * growth, growth * growth  # 2, 4, 16, 256, ...
        if not math.isfinite(gamma * growth):
            raise ValueError(
                f"more than {most} entries have no Fisher information on the retain set, and every "
                "gamma selects these; raise max_selected, or measure more retain samples"
            )
    high = gamma * growth
    while high > low * (1 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
