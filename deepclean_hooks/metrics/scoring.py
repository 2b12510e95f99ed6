"""The scores of a run: an evaluation, or the reason why there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from deepclean_hooks.data import losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data, Samples
from deepclean_hooks.metrics.evaluate import Gold, evaluate, require_same_data, several
from deepclean_hooks.metrics.evaluation import Evaluation
from deepclean_hooks.metrics.outputs import collect

_FEW = 2  # samples on which a gold model is tried


def scored(
    model: nn.Module,
    sets: Mapping[str, Data | Samples],
    loss_fn: LossFn | None = None,
    *,
    whatever: bool = False,
    **options: Any,
) -> Evaluation | str:
    """`evaluate` of the model on the sets, or the reason why it was not computed.

    A run with the user's `loss_fn` may have batches, labels and models that scoring cannot read.
    With the default loss only a TypeError is a reason, and other errors are raised. With `whatever`
    every error is a reason: at the end of a run no error may cost the report.
    """
    reasons: tuple[type[Exception], ...] = (TypeError,)
    if loss_fn not in (None, losses.cross_entropy):
        reasons = (TypeError, ValueError, NotImplementedError)
    if whatever:
        reasons = (Exception,)
    try:
        given: dict[str, Any] = {**sets, **options}
        return evaluate(model, **given)
    except reasons as reason:
        return f"not computed: {reason or type(reason).__name__}"


def require_comparable(gold: Gold | None, sets: Mapping[str, Samples], before: Evaluation) -> None:
    """Raises ValueError or TypeError for gold models or Evaluations that a model, evaluated
    `before` on these sets, cannot be compared with; runs gold models on a few samples.

    All ranks call this together.
    """
    scored = before.outputs["forget"].logits if "forget" in before.outputs else None
    for known in several(gold):
        if isinstance(known, Evaluation):
            require_same_data(known, sets)
            continue
        for name, source in sets.items():
            if source.indices is None:
                continue
            few = dataclasses.replace(source, indices=source.indices[:_FEW])
            logits = collect(known, few, name, logits=True).logits
            if scored is not None and logits is not None and scored.shape[1] != logits.shape[1]:
                raise ValueError(
                    f"a gold model has {logits.shape[1]} classes and the model {scored.shape[1]}; "
                    "pass as gold= models of the same classes, retrained without the forget set"
                )
