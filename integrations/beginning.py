"""How a run begins, alike on all ranks: from the original weights, or from a stored run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from deepclean_hooks import ranks
from deepclean_hooks.data.samples import Data
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.session import Session
from deepclean_hooks.stored import checkpoint, sealed
from deepclean_hooks.stored.sealed import BrokenRun


def require_same_way(resumes: bool) -> None:
    """Raises RuntimeError on every rank if some resume and others do not; all ranks call this.

    A session compares the rest; this comes before a stored run is read and verified.
    """
    ranks.require_agreement("the way into the run", "resume" if resumes else "measure")


def take_up(
    run: Session, state: Mapping[str, Any], forget: Data | None, retain: Data | Measurement | None
) -> None:
    """Goes on with a stored run; the sets, where they are known, are those it is scored on."""
    run.load_state_dict(state)
    known = {"forget": forget, "retain": retain}
    run.watch(
        **{
            name: data
            for name, data in known.items()
            if data is not None and not isinstance(data, Measurement)
        }
    )


def begin(run: Session, forget: Data, retain: Data | Measurement) -> None:
    """Measures, selects and resets."""
    run.measure(forget, retain)
    run.select()
    run.reset()


def verified(
    model: nn.Module,
    stored: Mapping[str, Any],
    where: str,
    way_out: str,
    repair: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The run in a sealed state, once the model has the weights it was sealed with, every bit.

    `repair` loads them again if they differ. Raises BrokenRun, on every rank, with the way out; all
    ranks call this.
    """
    digest = checkpoint.model_digest(model)  # of a sharded model, all ranks together
    with ranks.fail_together():
        try:
            run = sealed.opened(stored, where)
            if digest != stored["model"] and repair is not None:
                repair()
                digest = checkpoint.model_digest(model)
            if digest != stored["model"]:
                raise BrokenRun(
                    f"the weights that were loaded are not those that were saved in {where}"
                )
        except BrokenRun as reason:
            raise BrokenRun(f"{reason}. {way_out}") from reason
    return run
