"""Whether a model still computes: tried on a batch after its weights were given new values."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.data.walk import walk, walk_together
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.gradients import gradients
from deepclean_hooks.ranks import fsdp


class Unusable(ValueError):
    """The model computes NaN with its new values; `what` is NaN."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"with its new values {what} is NaN on a batch, so the model has its old ones back; a "
            "layer that divides by the size of its weights (weight_norm, a cosine layer) computes "
            "0 / 0 where all of a row are reset: leave that layer out of what may be selected, or "
            "select fewer entries"
        )


def require_usable(model: nn.Module, data: Samples, loss_fn: LossFn) -> None:
    """Raises Unusable if the loss of the first batch, or its gradient in a weight, is NaN, and
    whatever the model raises; all ranks call this. The model is left as it was.

    Under FSDP2 the loss alone is looked at.
    """
    with no_trace.no_trace(model) as inner, no_trace.float32_weights(inner) as dtype:
        device = no_trace.device_of(inner)
        if fsdp.is_sharded(inner):
            together = walk_together(data, device=device, dtype=dtype)
            for batch, _ in itertools.islice(together, 1):
                with ranks.fail_together():
                    _loss(inner, batch, loss_fn)
            return
        with ranks.fail_together():
            for batch in itertools.islice(walk(data, device=device, dtype=dtype), 1):
                loss = _loss(inner, batch, loss_fn)
                if loss.requires_grad:
                    _require_gradients(inner, loss)


def _loss(model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor:
    loss = loss_fn(model, batch)
    if bool(loss.isnan().any()):
        raise Unusable("the loss")
    return loss.sum()


def _require_gradients(model: nn.Module, loss: Tensor) -> None:
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in zip(weights, gradients(loss, list(weights.values())), strict=True):
        if gradient is not None and bool(gradient.isnan().any()):
            raise Unusable(f"the gradient of {name}")
