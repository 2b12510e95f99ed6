"""One negative log-likelihood per sample, for `(x, y)` batches and for Hugging Face batches.

N: samples of the batch, C: classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.call import call_of
from deepclean_hooks.data.logits import class_indices, logits_of

LossFn = Callable[[nn.Module, Batch], Tensor]
"""Maps (model, batch) to one negative log-likelihood per sample, shape (N,)."""


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """-log p(y | x, w) of each sample's own label, shape (N,): the default `loss_fn`."""
    logits, labels = logits_and_labels(model, batch)
    return F.cross_entropy(logits, labels, reduction="none")


def logits_and_labels(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Runs the model on a batch: logits (N, C) and labels (N,) as int64 class indices.

    Raises TypeError for a batch or an output whose parts are not clear, ValueError for labels that
    are no class indices and for outputs that are no logits of classes.
    """
    call = call_of(model, batch)
    logits = logits_of(model(*call.args, **call.kwargs), call)
    return logits, class_indices(call.labels, logits, call)


def per_sample(loss: object, count: int) -> Tensor:
    """The loss, after a check that it is one finite value per sample, shape (N,).

    Raises ValueError for a scalar (a mean hides the samples), another shape, NaN or infinity.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"loss_fn must return a tensor of shape ({count},), got {type(loss).__name__}"
        )
    if loss.dim() == 0:
        raise ValueError(
            f"loss_fn returned a scalar for {count} samples; the exact Fisher needs one loss per "
            "sample: use "
            'reduction="none"'
        )
    if loss.shape != (count,):
        raise ValueError(
            f"loss_fn must return one loss per sample, shape ({count},), got {tuple(loss.shape)}"
        )
    finite = torch.isfinite(loss.detach())
    if not finite.all():
        sample = int((~finite).nonzero()[0])
        raise ValueError(
            f"the loss of sample {sample} of the batch is {float(loss.detach()[sample])}; check "
            "the input, the label and the model's weights for NaN or infinity"
        )
    return loss
