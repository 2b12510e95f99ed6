"""What a selection means for each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deepclean_hooks.ranks import shards

Mask = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A parameter: how many entries it has, how many were selected, how many of those are dead,
    and how many may differ from the original in the end: those selected and those free to train."""

    name: str
    entries: int
    selected: int = 0
    dead: int | None = None
    held_back: int = 0
    may_change: int = 0


def layers_of(
    parameters: Mapping[str, Tensor], selected: Mask, free: Mask, held_back: Mapping[str, int]
) -> tuple[Layer, ...]:
    """A layer for each parameter; of sharded ones the counts are of all ranks, which all call
    this."""
    chosen = {name: shards.total(mask) for name, mask in selected.items()}
    return tuple(
        Layer(
            name,
            parameter.numel(),
            chosen.get(name, 0),
            held_back=held_back.get(name, 0),
            may_change=_may_change(selected.get(name), free.get(name), chosen.get(name, 0)),
        )
        for name, parameter in parameters.items()
    )


def _may_change(selected: Tensor | None, free: Tensor | None, count: int) -> int:
    """How many entries are selected or free to train; `count`: how many are selected."""
    if free is None or free is selected:
        return count
    return shards.total(free if selected is None else free | selected)
