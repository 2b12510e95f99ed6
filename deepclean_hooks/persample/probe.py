"""Finding out, on three samples, what a model does with a batch; and whether the rules agree with
the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.persample.call import mark
from deepclean_hooks.persample.forwards import Meetings, NaNPass, ShapePass, batch_dimensions
from deepclean_hooks.persample.intercept import Interception
from deepclean_hooks.persample.layout import MARKED
from deepclean_hooks.persample.layout import PROBE_SAMPLES as PROBE_SAMPLES

OTHER_SIZE = 5  # a second batch size: a dimension that grows from 3 to 5 is the batch

# Relative to the largest entry of the tensor. A wrong rule is off by its order of magnitude;
# rounding in float32 was 4e-4 of an entry at most (ResNet-50).
TOLERANCE = {torch.float64: 1e-8, torch.float32: 3e-3}
ZERO = {
    torch.float64: 1e-24,
    torch.float32: 1e-11,
}  # of the model's largest entry: pure rounding noise


Errors = dict[str, tuple[float, float, torch.dtype]]
"""Parameter -> (largest difference, largest entry, dtype)."""


class SamplesMixed(ValueError):
    """The model's output for a sample depends on the other samples of its batch."""


class ProbeFailed(Exception):
    """The model could not be probed; the one-sample loop still works."""


def samples(batch: Batch, count: int) -> Batch:
    """`count` samples of a batch, repeated from the start if it has fewer."""
    return batches.rows(batch, torch.arange(count) % batches.size(batch))


def marked(batch: Batch) -> Batch:
    """The batch with its tensors noted as data; views, so the user's own tensors carry no note."""
    viewed = batches.map_tensors(batch, lambda t: t.detach().view_as(t))
    mark(viewed)
    return viewed


def meetings(model: nn.Module, loss_fn: LossFn, batch: Batch) -> Meetings:
    """Where data meets parameters in this model, and how the samples lie there.

    Raises SamplesMixed if the model mixes the samples of a batch (a per-sample gradient would mean
    nothing), ProbeFailed if it cannot run with NaN.
    """
    few = samples(batch, PROBE_SAMPLES)
    first = ShapePass(PROBE_SAMPLES)
    with Interception(first):
        loss = loss_fn(model, marked(few))
    losses.per_sample(loss, PROBE_SAMPLES)
    expansions: list[int | None] = []
    if first.shapes:
        second = ShapePass(OTHER_SIZE)
        with Interception(second):
            loss_fn(model, marked(samples(batch, OTHER_SIZE)))
        if len(first.shapes) != len(second.shapes):
            raise ProbeFailed("its operations change with the batch size")
        expansions = batch_dimensions(first, second)
    return _with_nan(model, loss_fn, few, expansions)


def _with_nan(
    model: nn.Module, loss_fn: LossFn, few: Batch, expansions: list[int | None]
) -> Meetings:
    def spoil(tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor

    probing = NaNPass(PROBE_SAMPLES, expansions)
    try:
        with Interception(probing):
            loss = loss_fn(model, marked(batches.change_sample(few, MARKED, spoil)))
    except Exception as reason:  # the model ran on the same samples without NaN
        raise ProbeFailed(f"the model does not run with NaN: {reason}") from reason
    if bool(loss[0].isnan() or loss[PROBE_SAMPLES - 1].isnan()):
        raise SamplesMixed(_mixing(model))
    return probing.seen


def _mixing(model: nn.Module) -> str:
    culprits = [
        name
        for name, module in model.named_modules()
        if getattr(module, "track_running_stats", None) is False
        and isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    where = f" (batch normalisation without running statistics: {culprits})" if culprits else ""
    return (
        f"the model mixes the samples of a batch in eval mode{where}, so a sample has no gradient "
        "of its own; give its normalisation running statistics, or replace it by group "
        "normalisation"
    )


def groups(parameters: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """The parameters in groups of at most `most` bytes, or of one parameter that is larger."""
    group: dict[str, Tensor] = {}
    held = 0
    for name, parameter in parameters.items():
        size = parameter.numel() * parameter.element_size()
        if group and held + size > most:
            yield group
            group, held = {}, 0
        group[name] = parameter
        held += size
    if group:
        yield group


def disagreements(
    take: Callable[[str], Tensor],
    truth: Iterable[Mapping[str, Tensor]],
    worst: Callable[[Errors], Errors] = lambda errors: errors,
) -> dict[str, str]:
    """The parameters whose sums differ from the truth by more than rounding, each with by how much.

    `take(name)` gives up our sum, `truth` comes in groups, so that neither is held for all.
    `worst`: of the errors that each rank found in its part, the largest.
    """
    errors: Errors = {}
    for group in truth:
        for name, expected in group.items():
            sizes = (0.0, 0.0)
            if expected.numel():
                difference = take(name).sub_(expected).abs_().max()
                sizes = float(difference), float(expected.max())
            errors[name] = (*sizes, expected.dtype)
    errors = worst(errors)
    largest = max((size for _, size, _ in errors.values()), default=0.0)
    found: dict[str, str] = {}
    for name, (error, own, dtype) in errors.items():
        scale = max(own, ZERO.get(dtype, 1e-6) * largest)
        if not error <= TOLERANCE.get(dtype, 0.1) * scale:
            found[name] = f"self-check: off by {error / scale if scale else error:.1e}"
    return found
