"""One negative log-likelihood per sample, for `(x, y)` batches and for Hugging Face batches.

N: samples of the batch, C: classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks.data.batches import Batch

LossFn = Callable[[nn.Module, Batch], Tensor]
"""Maps (model, batch) to one negative log-likelihood per sample, shape (N,)."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """-log p(y | x, w) of each sample's own label, shape (N,): the default `loss_fn`."""
    logits, labels = logits_and_labels(model, batch)
    return F.cross_entropy(logits, labels, reduction="none")


def logits_and_labels(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Runs the model on a batch: logits (N, C) and labels (N,) as int64 class indices.

    Raises TypeError for a batch or an output of unknown form, ValueError for labels that are no
    class indices.
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise TypeError(
                "a batch that is a mapping needs the key 'labels', got the keys "
                f"{sorted(map(str, batch))}; rename the label column in the collate_fn (loss_fn= "
                "measures it as it is, and cannot be scored)"
            )
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
        labels = batch["labels"]
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        output = model(batch[0])
        labels = batch[1]
    else:
        length = f" of length {len(batch)}" if isinstance(batch, list | tuple) else ""
        raise TypeError(
            "a batch must be (x, y) or a mapping with 'labels', got "
            f"{type(batch).__name__}{length}; change the loader's collate_fn (loss_fn= "
            "measures it as it is, and cannot be scored)"
        )
    logits = logits_of(output)
    return logits, class_indices(labels, logits)


def logits_of(output: object) -> Tensor:
    """The logits in a model's output: a tensor, `.logits`, `["logits"]`, or the first of a
    tuple."""
    logits = output
    if not isinstance(logits, Tensor):
        if isinstance(getattr(output, "logits", None), Tensor):
            logits = output.logits  # type: ignore[attr-defined]  # checked on the line above
        elif isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
            logits = output["logits"]
        elif isinstance(output, list | tuple) and output and isinstance(output[0], Tensor):
            logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}, in which no logits were found; return a "
            "tensor of shape (N, C) or an object with .logits (loss_fn= measures others, and "
            "they cannot be scored)"
        )
    return logits


def class_indices(labels: Tensor, logits: Tensor) -> Tensor:
    """The labels (N,) as int64, after a check that each is a class of the logits (N, C)."""
    if logits.dim() != 2:
        raise ValueError(
            f"a classifier's logits have shape (N, C), got {tuple(logits.shape)}; loss_fn= "
            "measures other heads, and they cannot be scored"
        )
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"labels must be class indices (int64), got {kind}; loss_fn= measures soft or one-hot "
            "labels, and they cannot be scored"
        )
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape[:1])}, one per sample, got "
            f"{tuple(labels.shape)}"
        )
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= logits.shape[1]:
            bad = low if low < 0 else high
            raise ValueError(
                f"label {bad} is out of range: the model has {logits.shape[1]} classes, 0 to "
                f"{logits.shape[1] - 1}; remove such samples or map their labels"
            )
    return labels.long()


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
