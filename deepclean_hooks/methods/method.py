"""What a method is: which entries change, to what, and which may train afterwards. Pure functions
of tensors."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from deepclean_hooks.fisher import FisherDiagonal

Mask = dict[str, Tensor]
"""Parameter name -> bool tensor of its shape; a parameter that is not named is False throughout."""


@dataclass(frozen=True)
class Selection:
    """The entries that a method picked, W_f, and what it has to say about the others.

    `candidates`: entries that could have been picked; `held_back`: entries that the criterion
    picked but that hold only rounding noise; `criterion`: in words, for the report.
    """

    masks: Mask
    candidates: int
    criterion: str
    held_back: int = 0
    held_back_by_layer: dict[str, int] = field(default_factory=dict)


class Method(ABC):
    """One unlearning method; a frozen dataclass whose fields are its hyper-parameters."""

    name: str

    @abstractmethod
    def may_select(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether entries of this trainable parameter may be picked; only these are measured."""

    @abstractmethod
    def select(self, forget: FisherDiagonal, retain: FisherDiagonal) -> Selection:
        """W_f from the two measurements, both of the same parameters; changes nothing."""

    @abstractmethod
    def new_values(
        self,
        weights: Mapping[str, Tensor],
        selection: Selection,
        forget: FisherDiagonal,
        retain: FisherDiagonal,
    ) -> dict[str, Tensor]:
        """What the picked entries become: full-shape tensors, read only where the mask is True."""

    @abstractmethod
    def free(self, selection: Selection) -> Mask:
        """The entries that may train afterwards; every other entry keeps its bits."""

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters by name, for the report; callables appear by their name."""
        fields: tuple[dataclasses.Field[Any], ...] = ()
        if dataclasses.is_dataclass(self):
            fields = dataclasses.fields(self)
        values = {field.name: getattr(self, field.name) for field in fields}
        return {k: getattr(v, "__qualname__", v) for k, v in values.items()}
