"""`with unlearning(model, ...)`: unlearning around a training loop of your own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data
from deepclean_hooks.guard.guard import NormStatistics
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.metrics.evaluate import Gold
from deepclean_hooks.session import Session


@contextmanager
def unlearning(
    model: nn.Module,
    *,
    forget: Data,
    retain: Data | Measurement,
    method: Method,
    loss_fn: LossFn | None = None,
    norm_statistics: NormStatistics = "update",
    test: Data | None = None,
    forget_test: Data | None = None,
    gold: Gold | None = None,
    scores: bool = True,
    batch_size: int | None = None,
    collate_fn: Any = None,
    progress: bool = True,
    resume: Mapping[str, Any] | None = None,
) -> Iterator[Session]:
    """Measures, selects and resets on entry; holds the frozen entries while your loop runs; reports
    on exit.

    Whichever optimizer steps the model inside the block is held to the mask. Yields the session:
    `run.report`, and `run.state_dict()` for a checkpoint. With `resume=` such a state (the model's
    weights loaded before) nothing is measured or reset again. An exception in the block takes every
    hook off and goes on. The other arguments are those of `Session` and `Session.measure`. Raises
    ValueError for a method that trains by an objective of its own, which `unlearn()` has.
    """
    run = Session(
        model,
        method,
        loss_fn=loss_fn,
        norm_statistics=norm_statistics,
        test=test,
        forget_test=forget_test,
        gold=gold,
        scores=scores,
        batch_size=batch_size,
        collate_fn=collate_fn,
        progress=progress,
    )
    method.require_plain_training()
    with walked(run, forget, retain, resume):
        yield run


@contextmanager
def walked(
    run: Session,
    forget: Data,
    retain: Data | Measurement,
    resume: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Takes a session through its phases around the block."""
    if resume is None:
        run.measure(forget, retain)
        run.select()
        run.reset()
    else:
        run.load_state_dict(resume)
        run.watch(forget=forget)
        if not isinstance(retain, Measurement):
            run.watch(retain=retain)
    run.guard()
    try:
        yield
        run.finish()
    finally:
        run.close()
