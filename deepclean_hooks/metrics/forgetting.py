"""Does the model meet the forget set as it meets unseen data? A two-sample test on its losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks.data.samples import Data, Samples, samples_of
from deepclean_hooks.measure.answers import Answers, answers

DOUBT = 1.645  # standard deviations: remembered samples pass for unseen ones in 5 of 100 tests


@dataclass(frozen=True)
class Forgetting:
    """The losses of D_f beside those of unseen data of the same classes.

    `auc`: how often a forget sample has the larger loss of the two, each compared with every unseen
    sample of its class: 0.5 is as unseen, less is remembered, more stands out by being less
    familiar. `deviations`: its distance from 0.5 in standard deviations of that figure for unseen
    samples (Mann and Whitney's, class by class). Losses in nats, accuracies in per cent.
    """

    auc: float
    deviations: float
    forget_loss: float
    unseen_loss: float
    forget_accuracy: float
    unseen_accuracy: float

    @property
    def forgotten(self) -> bool:
        """Whether nothing tells D_f from unseen data by its losses being lower (at 5 per cent)."""
        return self.deviations > -DOUBT

    def __str__(self) -> str:
        state = "met as unseen data" if self.forgotten else "still told from unseen data"
        return (
            f"the forget set is {state}: AUC of its losses {self.auc:.3f} (0.5 is unseen; "
            f"{self.deviations:+.1f} standard deviations), accuracy {self.forget_accuracy:.1f} "
            f"beside {self.unseen_accuracy:.1f}"
        )


def forgetting(
    model: nn.Module,
    forget: Data | Samples,
    held_out: Data | Samples,
    *,
    batch_size: int | None = None,
    collate_fn: Any = None,
    progress: bool = False,
) -> Forgetting:
    """Tests the model on both sets; leaves it as it was.

    `held_out`: data of the same kind that the model was not trained on; it needs samples of every
    class of the forget set, else ValueError. All ranks call this.
    """
    gone = samples_of(forget, name="forget", batch_size=batch_size, collate_fn=collate_fn)
    unseen = samples_of(
        held_out,
        name="held_out",
        batch_size=batch_size or gone.batch_size,
        collate_fn=collate_fn or gone.collate_fn,
    )
    return compared(
        answers(model, gone, "forget", progress=progress),
        answers(model, unseen, "held_out", progress=progress),
    )


def compared(forget: Answers, unseen: Answers) -> Forgetting:
    """The test on a model's answers to both sets."""
    auc, variance, weights = 0.0, 0.0, torch.zeros(len(unseen.labels), dtype=torch.float64)
    for label in sorted(set(forget.labels.tolist())):
        here, there = forget.labels == label, unseen.labels == label
        if not there.any():
            raise ValueError(
                f"held_out has no sample of class {label}, which the forget set has; add some that "
                "the model was not trained on"
            )
        n, m, share = int(here.sum()), int(there.sum()), float(here.double().mean())
        auc += share * _larger(forget.losses[here], unseen.losses[there])
        variance += share**2 * (n + m + 1) / (12 * n * m)
        weights[there] = share / m
    right = (unseen.probabilities.argmax(1) == unseen.labels).double()
    return Forgetting(
        auc=auc,
        deviations=(auc - 0.5) / math.sqrt(variance),
        forget_loss=float(forget.losses.mean()),
        unseen_loss=float((weights * unseen.losses).sum()),
        forget_accuracy=100 * accuracy(forget),
        unseen_accuracy=100 * float((weights * right).sum()),
    )


def accuracy(given: Answers) -> float:
    """The share of samples whose true class has the highest probability."""
    return float((given.probabilities.argmax(1) == given.labels).double().mean())


def _larger(first: Tensor, second: Tensor) -> float:
    """How often a value of `first` is larger than a value of `second`; a tie counts half."""
    ordered = second.sort().values
    below = torch.searchsorted(ordered, first, side="left")
    up_to = torch.searchsorted(ordered, first, side="right")
    return float((below + up_to).double().mean()) / (2 * len(second))
