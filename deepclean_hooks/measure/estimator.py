"""How a method has the forget and the retain set measured."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from deepclean_hooks import ranks
from deepclean_hooks.data.changing import warn_if_changing
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.measure.request import Request, all_samples
from deepclean_hooks.ranks import fsdp


class Estimator(ABC):
    """One way to measure a data set; a frozen dataclass. Leaves the model as it was.

    `result`: the kind of measurement, which a stored one must be. `additive`: whether measurements
    of two sets add up to that of both, so that a stored one of the whole training set serves.
    """

    result: ClassVar[type[Measurement]] = Measurement
    additive: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, request: Request) -> Measurement:
        """The measurement of every sample of `request.data`, once."""

    def described(self, request: Request, **more: Any) -> dict[str, Any]:
        """The settings of a measurement that is about to be made; raises ValueError for a sharded
        model, which only the exact Fisher diagonal serves."""
        fsdp.refuse_sharded(request.inner, repr(self))
        with ranks.fail_together():
            changing = warn_if_changing(request.data, request.name)
        return {
            "model": request.origin,
            "loss": name_of(request.loss_fn),
            "estimator": repr(self),
            "samples_change": changing,
            "fingerprints": request.data.fingerprints,
            "torch": str(torch.__version__),
            **more,
        }


@dataclass(frozen=True)
class SamplesOnly(Estimator):
    """Which samples the sets hold, and nothing of the model: for methods that need no measurement.

    The sums are zeros without memory of their own.
    """

    def __call__(self, request: Request) -> Measurement:
        """Reads the samples; the model does not run."""
        with ranks.fail_together():
            ids = [i for known, _ in request.data.identified() for i in known]
        samples = all_samples(ids)
        zeros = {
            name: torch.zeros((), device=p.device).expand(p.shape)
            for name, p in request.weights.items()
        }
        return Measurement(zeros, len(samples), samples, self.described(request))


def name_of(loss_fn: LossFn) -> str:
    """The loss by its module and name, for a measurement's settings."""
    return f"{getattr(loss_fn, '__module__', '?')}.{getattr(loss_fn, '__qualname__', '?')}"


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
