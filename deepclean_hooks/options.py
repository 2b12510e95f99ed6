"""What can be set of a run, declared once: `Session` and every adapter take these by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import TypedDict

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data
from deepclean_hooks.guard.norm_statistics import NormStatistics
from deepclean_hooks.metrics.evaluate import Gold


class Options(TypedDict, total=False):
    """The options of a run; what is left out, or None, has the default that is named here."""

    loss_fn: LossFn | None
    """Maps (model, batch) to one negative log-likelihood per sample, (N,): cross-entropy."""

    norm_statistics: NormStatistics | None
    """What your loop does to running statistics of normalisation layers: "update" (it refreshes
    them from the retain data) or "freeze" (they keep their bits, in eval mode). By default "freeze"
    where less than 2 % of the weights may train, else "update"."""

    test: Data | None
    """Data of all classes that neither the model nor the loop was trained on, to be scored on."""

    forget_test: Data | None
    """Test data like the forget set, such as its class, to be scored on."""

    gold: Gold | None
    """Models retrained without the forget set, or their evaluations, to compare the scores with."""

    scores: bool
    """Whether to score the model before and after, a forward pass over all sets each: True."""

    dead_count: bool
    """Whether to count the reset entries that can never train again, a forward and backward pass
    of 8 retain batches: True."""

    batch_size: int | None
    """Of sets that are no loaders: 64."""

    collate_fn: Any
    """Of sets that are no loaders: torch's."""

    progress: bool
    """Whether to show progress bars, on rank 0 and in a terminal only: True."""


NAMES = tuple(Options.__annotations__)


def require_known(options: Mapping[str, object], call: str) -> None:
    """Raises TypeError, which lists the options there are, for a name that is none of them."""
    unknown = sorted(options.keys() - set(NAMES))
    if unknown:
        raise TypeError(
            f"{call} has no option {', '.join(map(repr, unknown))}; the options are "
            f"{', '.join(NAMES)}"
        )
