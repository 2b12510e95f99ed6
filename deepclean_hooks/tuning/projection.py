"""The two alphas of class projection by a search on training data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from deepclean_hooks.data import losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data, samples_of
from deepclean_hooks.measure.request import measured
from deepclean_hooks.methods.class_projection import ClassProjection
from deepclean_hooks.metrics.evaluate import evaluate

RETAIN_GRID = (10.0, 30.0, 100.0, 300.0, 1000.0)


FORGET_GRID = (1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Found:
    """One pair of a search, with its accuracies on training data and the paper's score, 0 to 1."""

    method: ClassProjection
    retain_accuracy: float
    forget_accuracy: float
    score: float


def search(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    method: ClassProjection | None = None,
    alphas_retain: Sequence[float] = RETAIN_GRID,
    alphas_forget: Sequence[float] = FORGET_GRID,
    loss_fn: LossFn | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[Found]:
    """Every pair of the grid by its score on these training data, the best first; changes nothing.

    Score: retain accuracy x (1 - forget accuracy), and the grid is the paper's; its published code
    picks by the TEST set's score instead. Both sets are measured once; each pair costs one
    evaluation of both, so pass Subsets to be quick.
    """
    method = method or ClassProjection()
    sets = {"forget": forget, "retain": retain}
    read = {n: samples_of(data, name=n, batch_size=batch_size) for n, data in sets.items()}
    seen = measured(
        method,
        model,
        read["forget"],
        read["retain"],
        loss_fn=loss_fn or losses.cross_entropy,
        progress=progress,
    )
    trial = copy.deepcopy(model)
    own = {name: p.detach() for name, p in model.named_parameters()}
    found = []
    for alpha_retain in alphas_retain:
        for alpha_forget in alphas_forget:
            one = replace(method, alpha_retain=alpha_retain, alpha_forget=alpha_forget)
            selection = one.select(seen.forget, seen.retain)
            values = one.new_values(own, selection, seen.forget, seen.retain)
            trial.load_state_dict(values, strict=False)
            scores = evaluate(
                trial, forget=read["forget"], retain=read["retain"], membership=False
            ).sets
            kept, known = scores["retain"].accuracy, scores["forget"].accuracy
            found.append(Found(one, kept, known, kept / 100 * (1 - known / 100)))
    return sorted(found, key=lambda each: each.score, reverse=True)
