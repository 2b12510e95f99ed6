"""Training that is not your loss on the retain set: what a method has `unlearn()` do instead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn


class Loader(Sized, Iterable[Any], Protocol):
    """Batches in an order of its own, as often as asked."""


@dataclass(frozen=True)
class Step:
    """The batches of one optimizer step, either of which may be missing, and when it is."""

    forget: Batch | None
    retain: Batch | None
    epoch: int
    epochs: int


class Training(ABC):
    """One run's training; made by `Method.training`, driven by `unlearn()`."""

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn

    def pairs(
        self, forget: Loader, retain: Loader, epoch: int
    ) -> Iterator[tuple[Batch | None, Batch | None]]:
        """The batches of one epoch: by default every retain batch, each with a forget batch."""
        again = iter(forget)
        for batch in retain:
            try:
                partner = next(again)
            except StopIteration:
                again = iter(forget)
                partner = next(again)
            yield partner, batch

    def length(self, forget: Loader, retain: Loader) -> int:
        """How many steps an epoch has."""
        return len(retain)

    @abstractmethod
    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """The scalar to be minimised in a step."""

    def adjust(self, parameters: Mapping[str, nn.Parameter]) -> None:  # noqa: B027
        """Changes the gradients before the optimizer reads them: not at all by default."""

    def mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean of the user's loss over a batch."""
        return losses.per_sample(self.loss_fn(model, batch), batches.size(batch)).mean()


class RetainOnly(Training):
    """Retain batches alone; for methods whose objective or gradients differ from a plain loop's."""

    def pairs(
        self, forget: Loader, retain: Loader, epoch: int
    ) -> Iterator[tuple[Batch | None, Batch | None]]:
        """Every retain batch once."""
        for batch in retain:
            yield None, batch

    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """The mean loss."""
        return self.mean_loss(model, step.retain)
