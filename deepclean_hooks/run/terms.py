"""The term that a method adds to the objective of the loop: prepared before the reset, added under
the guard."""

from __future__ import annotations

import torch
from torch import nn

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.measure.request import Measured
from deepclean_hooks.methods.adding import Adding
from deepclean_hooks.methods.method import Method, Selection
from deepclean_hooks.methods.term import Original, Term
from deepclean_hooks.run.phases import WasReset


def prepared(
    method: Method,
    model: nn.Module,
    forget: Samples,
    measured: Measured,
    selection: Selection,
    progress: bool,
) -> Term | None:
    """The method's term, made ready on the model as it is before any weight changes."""
    term = method.term()
    if term is not None:
        term.prepare(
            Original(
                model=model,
                forget=forget,
                selection=selection,
                forget_count=len(measured.forget.samples),
                retain_count=measured.retain_samples,
                seen=torch.cat([measured.forget.samples, measured.retain.samples]),
                progress=progress,
            )
        )
    return term


def adding(
    at: WasReset, method: Method, model: nn.Module, forget: Samples | None, loss_fn: LossFn
) -> Adding | None:
    """What adds the term's gradient before each step; raises ValueError without forget samples to
    draw from."""
    if at.term is None:
        return None
    if forget is None and at.term.draws:
        raise ValueError(
            f"{method.name} draws forget batches at every step, also in a resumed run; name the "
            "forget set, by watch(forget=...) in a session"
        )
    return Adding(at.term, model, forget, loss_fn, done=at.added)
