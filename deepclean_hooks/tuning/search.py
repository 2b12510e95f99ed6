"""Settings of a method by a search on training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deepclean_hooks.data import losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data, samples_of
from deepclean_hooks.measure.request import measured
from deepclean_hooks.methods.method import Method
from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.tuning import copies


@dataclass(frozen=True)
class Scored:
    """A method of a search, its accuracies (%) on training data and its score, 0 to 1."""

    method: Method
    retain_accuracy: float
    forget_accuracy: float
    score: float


def search(
    model: nn.Module,
    forget: Data,
    retain: Data,
    methods: Sequence[Method],
    *,
    loss_fn: LossFn | None = None,
    batch_size: int | None = None,
    collate_fn: Any = None,
    progress: bool = True,
) -> list[Scored]:
    """The methods by the score of the model after their reset, the best first; changes nothing.

    Score: retain accuracy x (1 - forget accuracy) on these training data, as in the paper of class
    projection, whose published code picks by the TEST set's score instead. Both sets are measured
    once, as the first method needs it, so the methods may differ only in what they make of that,
    such as `ClassProjection().grid()`. Each costs an evaluation of both sets: pass Subsets to be
    quick.
    """
    data = {"forget": forget, "retain": retain}
    sets = {
        name: samples_of(source, name=name, batch_size=batch_size, collate_fn=collate_fn)
        for name, source in data.items()
    }
    found = measured(
        methods[0],
        model,
        sets["forget"],
        sets["retain"],
        loss_fn=loss_fn or losses.cross_entropy,
        progress=progress,
    )
    scored = []
    for method in methods:
        selection = method.select(found.forget, found.retain)
        trial = copies.reset(model, method, selection, found)
        scores = evaluate(
            trial, forget=sets["forget"], retain=sets["retain"], membership=False, progress=False
        ).sets
        kept, known = scores["retain"].accuracy, scores["forget"].accuracy
        scored.append(Scored(method, kept, known, kept / 100 * (1 - known / 100)))
    return sorted(scored, key=lambda each: each.score, reverse=True)
