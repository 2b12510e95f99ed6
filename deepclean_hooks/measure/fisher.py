"""The exact empirical Fisher diagonal of a classifier: squares of each sample's own gradient,
summed, never averaged.

I_D(w_i) = (1/|D|) sum over (x, y) in D of (d log p(y | x, w) / d w_i)^2, with the data's own
labels, in eval mode.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.changing import changing_warning, warn_if_changing
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import (
    Data,
    Samples,
    require_same_on_ranks,
    samples_of,
)
from deepclean_hooks.data.walk import walk, walk_together
from deepclean_hooks.measure import classes
from deepclean_hooks.measure.estimator import Estimator, name_of
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.measure.request import Predicate, Request, all_samples, every_parameter
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.wrappers import require_trainable
from deepclean_hooks.persample.engine import NonFiniteGradient, SquaredGradients
from deepclean_hooks.persample.planner import DEFAULT_MEMORY_BUDGET, plans_of
from deepclean_hooks.persample.sharded import ShardedSquaredGradients
from deepclean_hooks.ranks import fsdp, shards
from deepclean_hooks.stored import bits


class FisherDiagonal(Measurement):
    """Sums of squared per-sample gradients and how many samples they are of.

    `sums`: parameter name -> tensor of the parameter's shape, in the accumulation's dtype, sharded
    if the parameter is (`.full_tensor()` gathers it, `.to_local()` is this rank's part); owned by
    this object. `samples`: (count,) int64 on the CPU, sorted: one 64-bit fingerprint of each
    sample's content. `settings`: how it was obtained (digest of the model, loss, estimator, dtypes,
    versions), compared by `+` and `-`. Where rounding leaves a negative difference, `-` puts 0.
    """

    noun = "diagonal"
    file_format = "deepclean-hooks fisher diagonal"
    squares = True

    def _settings_with(self, other: Measurement, sign: int) -> dict[str, Any]:
        both = (self.settings.get("classes"), other.settings.get("classes"))
        return {**self.settings, "classes": classes.combined(*both, sign)}

    def _difference(self, one: Tensor, other: Tensor) -> Tensor:
        difference = one - other
        shards.local(difference).clamp_min_(0)  # torch 2.7 has no clamp of sharded tensors
        return difference


def fisher_diagonal(
    model: nn.Module,
    data: Data | Samples,
    *,
    loss_fn: LossFn | None = None,
    parameters: Predicate | None = None,
    accumulate: torch.dtype = torch.float64,
    batch_size: int | None = None,
    collate_fn: Any = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    name: str = "data",
    progress: bool = True,
) -> FisherDiagonal:
    """The exact empirical Fisher diagonal of a model on a data set, each sample once over all
    ranks.

    `parameters(name, parameter)` says which trainable parameters to measure, all by default;
    `loss_fn` maps (model, batch) to one negative log-likelihood per sample, cross-entropy by
    default; `accumulate` is the dtype of the sums; `memory_budget` is in bytes, for per-sample
    gradients beyond a plain forward and backward. Weights in half precision are measured through
    float32 copies. The model is probed and checked at its first measurement; later ones use what
    was learned then as long as the model lives. It is left as it was, after an exception too. Of a
    model under FSDP2 (`fully_shard`) the sums are sharded as its parameters are; all ranks call
    this together.

    Raises ValueError or TypeError, naming the batch, for an empty set, bad labels, a scalar loss, a
    NaN loss or gradient, a model that mixes samples or has nothing to train.
    """
    with ranks.fail_together():
        source = samples_of(data, name=name, batch_size=batch_size, collate_fn=collate_fn)
    request = Request(
        model,
        source,
        name,
        loss_fn or losses.cross_entropy,
        parameters or every_parameter,
        progress,
    )
    return diagonal(request, accumulate=accumulate, memory_budget=memory_budget)


def diagonal(
    request: Request,
    *,
    accumulate: torch.dtype = torch.float64,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> FisherDiagonal:
    """`fisher_diagonal` of what is requested."""
    parts = [request.data]
    return next(diagonals(request, parts, accumulate=accumulate, memory_budget=memory_budget))


def diagonals(
    request: Request,
    parts: Sequence[Samples],
    *,
    accumulate: torch.dtype = torch.float64,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Iterator[FisherDiagonal]:
    """The diagonal of each part of the requested set, which is checked as a whole before the
    first."""
    inner, loss, name = request.inner, request.loss_fn, request.name
    with ranks.fail_together():
        no_trace.require_precision(inner, accumulate)
        fsdp.require_measurable(inner, ranks.world()[1])
        changing = warn_if_changing(request.data, name)
        wanted = _wanted(request)
    require_same_on_ranks(request.data, name, changing)
    if ranks.world()[1] > 1:
        ranks.require_agreement("the set of measured weights", bits.digest(dict(wanted)))
    origin = request.origin
    for source in parts:
        with no_trace.no_trace(inner), no_trace.float32_weights(inner) as dtype:
            kept = {id(p) for p in wanted.values()}
            for p in inner.parameters():
                p.requires_grad_(id(p) in kept)
            pass_ = _Pass(inner, wanted, source, loss, accumulate, memory_budget, dtype, name)
            engine, ids, labels = pass_.run(request.label("Fisher"))
        sums, samples = _over_ranks(engine, ids, name)
        if not name_of(loss).startswith("deepclean_hooks."):  # ours read the logits
            _warn_of_unreached_head(inner, sums, name)
        if source.stream is not None and source.stream.changes():
            changing = True
            warnings.warn(changing_warning(name), UserWarning, stacklevel=2)
        settings = {
            "model": origin,
            "loss": name_of(loss),
            "estimator": "per-sample",
            "computed": engine.computed,
            "accumulate": str(accumulate).removeprefix("torch."),
            "one_sample_loop": dict(sorted(engine.notes.items())),
            "samples_change": changing,
            "fingerprints": source.fingerprints,
            "classes": labels.over_ranks(),
            "torch": str(torch.__version__),
        }
        yield FisherDiagonal(sums, len(samples), samples, settings)


def _wanted(request: Request) -> dict[str, nn.Parameter]:
    wanted = request.weights
    if not wanted:
        everything = require_trainable(request.inner)
        raise ValueError(
            f"parameters= accepts none of the {len(everything)} trainable parameters, for instance "
            f"{list(everything)[:3]}; widen the pattern or the predicate"
        )
    return wanted


def _warn_of_unreached_head(model: nn.Module, sums: dict[str, Tensor], name: str) -> None:
    """Warns if the last weight of the model has no gradient though others have: the loss may read
    features where it should read logits."""
    weights = [n for n, p in model.named_parameters() if p.dim() > 1]
    head = sums.get(weights[-1]) if weights else None
    if head is None or shards.is_shard(head) or head.any() or not ranks.is_first():
        return
    if not any(shards.is_shard(total) or total.any() for total in sums.values()):
        warnings.warn(
            f"every gradient of {name} is exactly 0, so nothing can be selected; check that "
            "loss_fn= depends on the model's output, without detach() or no_grad()",
            UserWarning,
            stacklevel=3,
        )
    else:
        warnings.warn(
            f"no sample of {name} has a gradient at {weights[-1]}, the last weight of the model; "
            "check that the loss reads the logits and not the features before them",
            UserWarning,
            stacklevel=3,
        )


@dataclass
class _Pass:
    """One walk over the data; errors are given the name of the set and the number of the batch."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    source: Samples
    loss_fn: LossFn
    accumulate: torch.dtype
    memory_budget: int
    dtype: torch.dtype | None
    name: str

    def run(self, label: str | None) -> tuple[SquaredGradients, list[int], classes.Counted]:
        """The engine with its sums, and the fingerprints and labels of this rank's samples.

        Fails on all ranks together.
        """
        ids: list[int] = []
        labels = classes.Counted()
        at = 0
        # The ranks of a sharded model fail together inside, where their collectives are.
        with contextlib.nullcontext() if self.sharded else ranks.fail_together():
            engine: SquaredGradients = self._engine()
            try:
                for index, (batch, counted) in self._walk(label, ids):
                    at = index
                    engine.add(batch, counted)
                    labels.add(batch, counted)
                engine.require_finite()
            except NonFiniteGradient as reason:
                raise self._locate(reason, at) from None
            except (ValueError, TypeError) as reason:
                raise type(reason)(f"{self.name}, batch {at}: {reason}") from reason
        return engine, ids, labels

    def _engine(self) -> SquaredGradients:
        engine = ShardedSquaredGradients if self.sharded else SquaredGradients
        return engine(
            self.model,
            self.parameters,
            loss_fn=self.loss_fn,
            dtype=self.accumulate,
            memory_budget=self.memory_budget,
            plans=plans_of(self.model),
        )

    def _walk(
        self, label: str | None = None, ids: list[int] | None = None
    ) -> Iterator[tuple[int, tuple[Batch, int]]]:
        """(Number, (batch, how many of its first samples count))."""
        how: dict[str, Any] = {
            "device": no_trace.device_of(self.model),
            "dtype": self.dtype,
            "progress": label,
            "ids": ids,
        }
        if self.sharded:
            return enumerate(walk_together(self.source, **how))
        walked = walk(self.source, **how)
        return enumerate((batch, batches.size(batch)) for batch in walked)

    @property
    def sharded(self) -> bool:
        """Whether the parameters are spread over the ranks."""
        return any(map(shards.is_shard, self.parameters.values()))

    def _locate(self, reason: NonFiniteGradient, last: int) -> ValueError:
        """Sums are checked every few batches; walks again to name the batch."""
        for index, (batch, counted) in self._walk():
            engine = self._engine()
            engine.add(batch, counted)
            try:
                engine.require_finite()
            except NonFiniteGradient as found:
                return ValueError(
                    f"{self.name}, batch {index}: {found}; check that batch's inputs and the "
                    "model's weights"
                )
            if index >= last:
                break
        return ValueError(f"{self.name}, somewhere up to batch {last}: {reason}")


def _over_ranks(
    engine: SquaredGradients, ids: list[int], name: str
) -> tuple[dict[str, Tensor], Tensor]:
    sums = engine.totals()
    ranks.sum_over_ranks({n: total for n, total in sums.items() if not shards.is_shard(total)})
    samples = all_samples(ids)
    if not len(samples):
        raise ValueError(f"{name} is empty: its loader yielded no batch; check how it was made")
    return sums, samples


@dataclass(frozen=True)
class PerSampleFisher(Estimator):
    """The exact empirical Fisher diagonal: the square of each sample's own gradient."""

    result = FisherDiagonal

    def __call__(self, request: Request) -> FisherDiagonal:
        """`fisher_diagonal` of what is requested."""
        return diagonal(request)
