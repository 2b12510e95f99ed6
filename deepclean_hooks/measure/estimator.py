"""How a method has the forget and the retain set measured."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from deepclean_hooks import ranks
from deepclean_hooks.data import batches
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.model.wrappers import require_trainable, unwrap
from deepclean_hooks.ranks import fsdp
from deepclean_hooks.stored.checkpoint import model_digest

Predicate = Callable[[str, nn.Parameter], bool]


class Estimator(ABC):
    """One way to measure a data set; a frozen dataclass. Leaves the model as it was.

    `result`: the kind of measurement, which a stored one must be. `additive`: whether measurements
    of two sets add up to that of both, so that a stored one of the whole training set serves.
    """

    result: ClassVar[type[Measurement]] = Measurement
    additive: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        data: Samples,
        *,
        loss_fn: LossFn,
        parameters: Predicate,
        name: str,
        progress: bool,
    ) -> Measurement:
        """The measurement of every sample once; `name` is the set's, for messages."""

    def described(self, model: nn.Module, loss_fn: LossFn, **more: Any) -> dict[str, Any]:
        """The settings of a measurement that is about to be made; raises ValueError for a sharded
        model, which only the exact Fisher diagonal serves."""
        fsdp.refuse_sharded(unwrap(model), repr(self))
        return {
            "model": model_digest(model),
            "loss": f"{loss_fn.__module__}.{getattr(loss_fn, '__qualname__', '?')}",
            "estimator": repr(self),
            "torch": str(torch.__version__),
            **more,
        }


@dataclass(frozen=True)
class SamplesOnly(Estimator):
    """Which samples the sets hold, and nothing of the model: for methods that need no measurement.

    The sums are zeros without memory of their own.
    """

    def __call__(
        self,
        model: nn.Module,
        data: Samples,
        *,
        loss_fn: LossFn,
        parameters: Predicate,
        name: str,
        progress: bool,
    ) -> Measurement:
        """Reads the samples; the model does not run."""
        with ranks.fail_together():
            ids = [i for batch in data.batches() for i in batches.sample_ids(batch)]
        everyone = [i for part in ranks.gather(ids) for i in part]
        wanted = {
            n: torch.zeros((), device=p.device).expand(p.shape)
            for n, p in require_trainable(unwrap(model)).items()
            if parameters(n, p)
        }
        samples = torch.tensor(sorted(everyone), dtype=torch.int64)
        return Measurement(wanted, len(everyone), samples, self.described(model, loss_fn))


def together(retain: Samples, forget: Samples) -> Samples:
    """The retain samples and then the forget samples, in batches that do not stop in between.

    Raises ValueError for samples without indices.
    """
    if retain.indices is None or forget.indices is None:
        raise ValueError(
            "an estimator of batch means walks both sets as one, which needs samples with indices; "
            "pass a Dataset with a length"
        )
    parts = [Subset(one.dataset, list(one.indices or ())) for one in (retain, forget)]
    count = len(retain.indices) + len(forget.indices)
    return dataclasses.replace(
        retain, dataset=ConcatDataset(parts), indices=tuple(range(count)), loader=None
    )


def shared_samples(forget: Measurement, both: Measurement) -> int:
    """How many forget samples stand in the rest of `both`, a measurement of retain and forget."""
    rest = Counter(both.samples.tolist())
    rest.subtract(forget.samples.tolist())
    return sum((+rest & Counter(forget.samples.tolist())).values())


def rebatched(estimator: Estimator, data: Samples, batch_size: int, name: str) -> Samples:
    """The samples in batches of the estimator's own size, whatever the loader's is.

    Raises ValueError on several ranks, and for a loader that makes its own batches.
    """
    if ranks.world()[1] > 1:
        raise ValueError(
            f"{estimator!r} depends on how samples fall into batches, so {ranks.world()[1]} ranks "
            "would give another result than one; launch one process"
        )
    if data.indices is None and data.batch_size != batch_size:
        raise ValueError(
            f"{name} is a loader that makes its own batches of {data.batch_size}, and "
            f"{estimator!r} needs batches of {batch_size}; pass a Dataset with a length"
        )
    return dataclasses.replace(data, batch_size=batch_size)
