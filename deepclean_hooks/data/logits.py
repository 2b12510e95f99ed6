"""A classifier's logits in what its model returned, and the labels as classes of them. An
output that can be read in several ways is refused.

N: samples of the batch, C: classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepclean_hooks.data.batches import INTEGERS
from deepclean_hooks.data.call import SCORED, Call


def logits_of(output: object, call: Call) -> Tensor:
    """The logits in a model's output: a tensor, `.logits`, `["logits"]`, or the only tensor of
    a tuple that could be it.

    Raises TypeError where no tensor, or more than one, has the shape (N, C).
    """
    if isinstance(output, Tensor):
        return output
    held = getattr(output, "logits", None)
    if held is None and isinstance(output, Mapping):
        held = output.get("logits")
    if isinstance(held, Tensor):
        return held
    entries: dict[object, object] = {}
    if isinstance(output, list | tuple):
        entries = dict(enumerate(output))
    elif isinstance(output, Mapping):
        entries = dict(output)
    candidates = {
        key: value
        for key, value in entries.items()
        if isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
    }
    if len(candidates) == 1 and isinstance(output, list | tuple):
        return next(iter(candidates.values()))
    if len(candidates) > 1:
        shapes = ", ".join(f"[{key!r}]: {tuple(t.shape)}" for key, t in candidates.items())
        last = f"[{list(candidates)[-1]!r}]"
        raise TypeError(
            f"the model returned {len(candidates)} tensors that could be the logits ({shapes}), "
            f"and which of them is not clear; if it is {last}, pass {call.loss(output=last)} "
            f"({SCORED}), or wrap the model so that it returns the logits only"
        )
    keys = f" with {sorted(map(str, entries))}" if isinstance(output, Mapping) else ""
    first = f"[{next(iter(candidates), 'logits')!r}]"
    raise TypeError(
        f"the model returned {type(output).__name__}{keys}, in which no logits were found; return "
        "a tensor of shape (N, C) or an object with .logits, or pass "
        f"{call.loss(output=first)} ({SCORED})"
    )


def class_indices(labels: object, logits: Tensor, call: Call) -> Tensor:
    """The labels (N,) as int64, after a check that each is a class of the logits (N, C), and that
    these are logits.

    Raises ValueError for anything else, a single logit and probabilities among it.
    """
    _require_logits(logits, call)
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
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


def _require_logits(logits: Tensor, call: Call) -> None:
    column = logits.dim() == 2 and logits.shape[1] == 1
    if column or logits.dim() == 1:
        raise ValueError(
            f"the model gives one logit a sample, {tuple(logits.shape)}, whose cross-entropy is 0 "
            f"whatever it is; for a sigmoid head pass {call.binary(column=column)} ({SCORED})"
        )
    if logits.dim() != 2:
        raise ValueError(
            f"a classifier's logits have shape (N, C), got {tuple(logits.shape)}; loss_fn= "
            "measures other heads, and they cannot be scored"
        )
    if _are_probabilities(logits.detach()):
        raise ValueError(
            "the model returned probabilities (every row is positive and sums to 1), whose "
            "cross-entropy is not the loss that it was trained with; return the logits "
            "from before the softmax, or their logarithm, which cross-entropy leaves as it is: "
            f"{call.loss(output='.log()')} ({SCORED})"
        )


def _are_probabilities(values: Tensor) -> bool:
    """Whether all rows, of which two differ, are positive and sum to 1 but for rounding."""
    # Two logits of a single sample sum to 1 by chance now and then.
    if len(values) < 2 or torch.equal(values[0], values[-1]) or bool((values < 0).any()):
        return False
    if not bool(((values > 0) & (values < 1)).any()):
        return False  # one-hot answers of a rule, no softmax
    rounding = min(1e-2, 4 * values.shape[1] * torch.finfo(values.dtype).eps)
    return bool(((values.sum(1) - 1).abs() < rounding).all())
