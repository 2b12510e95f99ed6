"""The Fisher diagonal with labels as the model expects them, each weighted by its probability.

F(w_i) = (1/|D|) sum over x in D and classes y of p(y | x) (d log p(y | x, w) / d w_i)^2. Not the
empirical Fisher diagonal of `fisher_diagonal`, which takes the data's own labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks.data import losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.fisher import FisherDiagonal, diagonal
from deepclean_hooks.measure.request import Request


@dataclass(frozen=True)
class ExpectedFisher(Estimator):
    """Exact, per sample: one pass over the data for each of `classes` classes."""

    classes: int
    result = FisherDiagonal

    def __call__(self, request: Request) -> FisherDiagonal:
        """The sum over classes; the user's loss is not used, the outputs are probabilities."""
        total: FisherDiagonal | None = None
        request = replace(request, model_digest=request.origin)
        for label in range(self.classes):
            one = diagonal(replace(request, loss_fn=_OneLabel(label, self.classes)))
            if total is None:
                total = one
            else:
                for key, value in one.sums.items():
                    total.sums[key] += value
        assert total is not None
        settings = {**total.settings, "loss": "expected", "estimator": repr(self)}
        return replace(total, settings=settings)


class _OneLabel:
    """sqrt(p(y | x)) * -log p(y | x) with the root held constant: its gradient squared is p g^2."""

    def __init__(self, label: int, classes: int) -> None:
        self.label, self.classes = label, classes

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, _ = losses.logits_and_labels(model, batch)  # (N, C)
        if logits.shape[1] != self.classes:
            raise ValueError(
                f"the model has {logits.shape[1]} classes, not {self.classes}; pass classes="
                f"{logits.shape[1]}"
            )
        label = torch.full((len(logits),), self.label, device=logits.device)
        weight = logits.softmax(1)[:, self.label].detach().sqrt()
        return weight * F.cross_entropy(logits, label, reduction="none")
