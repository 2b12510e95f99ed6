"""Training that is not a term beside your loss on the retain set: what a method has `unlearn()` do
instead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn

Loader = DataLoader[Any]


@dataclass(frozen=True)
class Step:
    """The batch of one optimizer step, and the epoch it is in.

    `of_forget`: which of its samples are of the forget set, a bool for each or for all.
    """

    batch: Batch
    of_forget: Tensor | bool
    epoch: int


class Training(ABC):
    """One run's training; made by `Method.training`, driven by `unlearn()`."""

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn

    @abstractmethod
    def steps(self, forget: Loader, retain: Loader, epoch: int) -> Iterator[Step]:
        """The steps of one epoch; both loaders shuffle."""

    @abstractmethod
    def length(self, forget: Loader, retain: Loader) -> int:
        """How many steps an epoch has, at most."""

    @abstractmethod
    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """The scalar to be minimised in a step."""

    def mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean of the user's loss over a batch."""
        return losses.per_sample(self.loss_fn(model, batch), batches.size(batch)).mean()


def in_turn(forget: Loader | tuple[()], retain: Loader, epoch: int) -> Iterator[Step]:
    """Every forget batch, then every retain batch."""
    for batch in forget:
        yield Step(batch, True, epoch)
    for batch in retain:
        yield Step(batch, False, epoch)
