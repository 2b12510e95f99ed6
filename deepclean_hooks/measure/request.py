"""What is to be measured: of one set, as an estimator is asked, and of both, as a method needs
it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from deepclean_hooks import ranks
from deepclean_hooks.data import losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.measure import stored_retain
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.model.wrappers import require_trainable, unwrap
from deepclean_hooks.ranks import fsdp
from deepclean_hooks.stored.checkpoint import model_digest

if TYPE_CHECKING:
    from deepclean_hooks.measure.estimator import Estimator

Predicate = Callable[[str, nn.Parameter], bool]


def every_parameter(name: str, parameter: nn.Parameter) -> bool:
    """True: nothing is left out."""
    return True


@dataclass(frozen=True)
class Request:
    """One set that is to be measured on a model.

    `name` is the set's, for messages; `parameters(name, parameter)` says which trainable parameters
    are measured; `model_digest` is that of the model, where the caller has it already.
    """

    model: nn.Module
    data: Samples
    name: str = "data"
    loss_fn: LossFn = losses.cross_entropy
    parameters: Predicate = every_parameter
    progress: bool = True
    model_digest: str | None = None

    @property
    def inner(self) -> nn.Module:
        """The model without its wrappers."""
        return unwrap(self.model)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The trainable parameters that are measured, by name."""
        everything = require_trainable(self.inner)
        return {name: p for name, p in everything.items() if self.parameters(name, p)}

    @property
    def origin(self) -> str:
        """The digest of the model, the same on every rank: rank 0's buffers serve all."""
        return self.model_digest or ranks.gather(model_digest(self.model))[0]

    def label(self, what: str) -> str | None:
        """The text of the progress bar; None for none."""
        return f"{what} {self.name}" if self.progress else None


def all_samples(fingerprints: list[int]) -> Tensor:
    """The fingerprints of every rank's samples: int64 on the CPU, sorted."""
    everyone = [i for part in ranks.gather(fingerprints) for i in part]
    return torch.tensor(sorted(everyone), dtype=torch.int64)


class Needs(Protocol):
    """What a method says of its measurements; `methods.method.Method` explains each."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def measured_by(self) -> Estimator: ...  # noqa: D102

    @property
    def retain_measured_by(self) -> Estimator: ...  # noqa: D102

    @property
    def joint(self) -> bool: ...  # noqa: D102

    def may_select(self, name: str, parameter: nn.Parameter) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Measured:
    """D_f and D_r as a method is given them.

    `retain_samples`: how many samples D_r has, also where `retain` is of D_r and D_f; `shared`: how
    many forget samples stand in D_r with the same content.
    """

    forget: Measurement
    retain: Measurement
    retain_samples: int
    shared: int


def measured(
    needs: Needs,
    model: nn.Module,
    forget: Samples,
    retain: Samples | Measurement,
    *,
    loss_fn: LossFn,
    progress: bool,
    model_digest: str | None = None,
) -> Measured:
    """Both sets, measured as the method needs them; the model is left as it was.

    A stored `retain` must have passed `require_of_use`. Raises ValueError if every forget sample
    stands in the retain set.
    """
    of_forget = Request(model, forget, "forget", loss_fn, needs.may_select, progress, model_digest)
    of_forget = dataclasses.replace(of_forget, model_digest=of_forget.origin)
    first = needs.measured_by(of_forget)
    if isinstance(retain, Measurement):
        here = retain.placed_like(dict(fsdp.parameters_of(of_forget.inner)))
        served = stored_retain.of_both if needs.joint else stored_retain.without
        second = served(here, first)
    else:
        source = together(retain, forget) if needs.joint else retain
        second = needs.retain_measured_by(
            dataclasses.replace(of_forget, data=source, name="retain")
        )
    if needs.joint:
        rest = len(second.samples) - len(first.samples)
        return Measured(first, second, rest, shared_samples(first, second))
    shared = stored_retain.shared_content(first, second)
    return Measured(first, second, len(second.samples), shared)


def require_of_use(
    needs: Needs, stored: Measurement, model: nn.Module, model_digest: str | None = None
) -> None:
    """Raises ValueError or TypeError if a stored measurement is none that the method takes of this
    model; `model_digest` is the model's, where the caller has it already."""
    estimator = needs.retain_measured_by
    if not isinstance(stored, estimator.result):
        raise TypeError(
            f"{needs.name} needs a stored {estimator.result.__name__}, got "
            f"{type(stored).__name__}; pass the retain set to have it measured"
        )
    if needs.joint and stored.settings.get("estimator") != repr(estimator):
        raise ValueError(
            f"{needs.name} needs a measurement of the whole training set by "
            f"{estimator!r}, the stored one is by {stored.settings.get('estimator')}; pass the "
            "retain set to have it measured"
        )
    if not estimator.additive and not needs.joint:
        raise ValueError(
            f"{estimator!r} cannot subtract samples from a stored measurement; pass the retain set"
        )
    stored.require_model(model, model_digest)


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
