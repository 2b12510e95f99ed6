"""Finding out, on three samples, what a model does with a batch; and whether the rules agree with
the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.persample import repeatable
from deepclean_hooks.persample.call import mark
from deepclean_hooks.persample.forwards import Meetings
from deepclean_hooks.persample.intercept import Interception
from deepclean_hooks.persample.layout import MARKED
from deepclean_hooks.persample.layout import PROBE_SAMPLES as PROBE_SAMPLES
from deepclean_hooks.persample.probing import NaNPass, ShapePass, batch_dimensions, give_twins, twin
from deepclean_hooks.persample.repeatable import REPEATS, Unmeasurable

OTHER_SIZE = 5  # a second batch size: a dimension that grows from 3 to 5 is the batch

# Relative to the largest entry of the tensor. A wrong rule is off by its order of magnitude;
# rounding in float32 was 4e-4 of an entry at most (ResNet-50).
TOLERANCE = {torch.float64: 1e-8, torch.float32: 3e-3}
COARSE = {torch.float64: 1e-4, torch.float32: 3e-2}  # for a model that computes in less
ZERO = {
    torch.float64: 1e-24,
    torch.float32: 1e-11,
}  # of the model's largest entry: pure rounding noise


Errors = dict[str, tuple[float, float, torch.dtype]]
"""Parameter -> (largest difference, largest entry, dtype)."""


Agreed = Callable[[bool], bool]


def of_the_machine(error: Exception) -> bool:
    """Whether an error says nothing of the model: it comes out and is not remembered."""
    # torch.OutOfMemoryError is a RuntimeError, and the CPU's allocator raises just that.
    lacking = (
        isinstance(error, RuntimeError)
        and "memory" in str(error)
        and ("out of memory" in str(error) or "allocate" in str(error))
    )
    return lacking or isinstance(error, MemoryError | OSError)


class SamplesMixed(Unmeasurable):
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


def meetings(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    first_loss: tuple[Tensor, bool],
    agreed: Agreed = bool,
) -> Meetings:
    """Where data meets parameters in this model, and how the samples lie there.

    `first_loss`: of the first samples, and whether random numbers were drawn for it. `agreed`:
    whether a condition holds on one of the ranks that run the same passes. Raises Unmeasurable if
    that loss does not come out again, or depends on the other samples of the batch.
    """
    loss, drew = first_loss
    few = samples(batch, PROBE_SAMPLES)
    first = ShapePass(PROBE_SAMPLES)
    with Interception(first):
        again = loss_fn(model, marked(few))
    again = losses.per_sample(again, PROBE_SAMPLES)
    repeats = REPEATS if agreed(drew) else 0
    repeatable.require_repeatable(model, loss_fn, few, loss, again, repeats, agreed)
    require_separate(model, loss_fn, few, loss, agreed)
    expansions: list[int | None] = []
    if first.shapes:
        second = ShapePass(OTHER_SIZE)
        with Interception(second):
            loss_fn(model, marked(samples(batch, OTHER_SIZE)))
        if len(first.shapes) != len(second.shapes):
            raise ProbeFailed("its operations change with the batch size")
        expansions = batch_dimensions(first, second)
    seen = _with_nan(model, loss_fn, few, NaNPass(PROBE_SAMPLES, expansions, first.reads))
    blank = NaNPass(PROBE_SAMPLES, expansions, first.reads)
    if agreed(seen is None or not seen.apart):
        # Not the model's fault: 0 times NaN is NaN behind a mask, and some operations refuse NaN.
        _require_separate_among_others(model, loss_fn, few, agreed)
        seen = _without_nan(model, loss_fn, few, blank)
    elif agreed(first.chosen):
        # A comparison with NaN is false: the forward may have taken another way.
        plain = _without_nan(model, loss_fn, few, blank)
        if seen is None or agreed(plain.functions != seen.functions):
            seen = plain
    assert seen is not None
    return seen


def _with_nan(model: nn.Module, loss_fn: LossFn, few: Batch, probing: NaNPass) -> Meetings | None:
    """What is seen with NaN in one sample; None if the model, which ran without, does not run."""

    def spoil(tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor

    spoiled = marked(batches.change_sample(few, MARKED, spoil))
    twins = batches.change_sample(batches.map_tensors(few, twin), MARKED, spoil)
    give_twins(batches.tensors(spoiled), batches.tensors(twins))
    try:
        with Interception(probing):
            loss = loss_fn(model, spoiled)
    except Exception as reason:
        if of_the_machine(reason):
            raise
        return None
    probing.seen.apart = not bool(loss[0].isnan() or loss[PROBE_SAMPLES - 1].isnan())
    return probing.seen


def _without_nan(model: nn.Module, loss_fn: LossFn, few: Batch, probing: NaNPass) -> Meetings:
    with Interception(probing):
        loss_fn(model, marked(few))
    probing.seen.apart = False
    probing.seen.layouts = [[(None, s) for _, s in asked] for asked in probing.seen.layouts]
    return probing.seen


def require_separate(
    model: nn.Module, loss_fn: LossFn, few: Batch, loss: Tensor, agreed: Agreed = bool
) -> None:
    """Raises SamplesMixed if a sample's loss alone (shown twice) is not that in its batch."""
    with torch.no_grad():
        twice = batches.rows(few, torch.tensor([MARKED, MARKED]))
        alone = losses.per_sample(loss_fn(model, twice), 2)
    beside = loss.detach()[MARKED].expand(2)
    if agreed(not repeatable.same(alone, beside)):
        raise SamplesMixed(_mixing(model, float(alone[0]), float(beside[0])))


def _require_separate_among_others(
    model: nn.Module, loss_fn: LossFn, few: Batch, agreed: Agreed
) -> None:
    """The same with other samples beside the marked one: three copies of one sample would hide
    that the model normalises by the batch."""
    others = few
    for at in range(PROBE_SAMPLES):
        if at != MARKED:
            others = batches.change_sample(others, at, lambda t: t.flip(tuple(range(t.dim()))))
    try:
        with torch.no_grad():
            loss = losses.per_sample(loss_fn(model, others), PROBE_SAMPLES)
    except (ValueError, RuntimeError):  # the model takes no such samples
        return
    require_separate(model, loss_fn, few, loss, agreed)


def _mixing(model: nn.Module, alone: float, beside: float) -> str:
    culprits = [
        name
        for name, module in model.named_modules()
        if getattr(module, "track_running_stats", None) is False
        and isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    where = f" (batch normalisation without running statistics: {culprits})" if culprits else ""
    return (
        f"the model mixes the samples of a batch in eval mode{where}, so a sample has no gradient "
        f"of its own (loss of a sample alone {alone:.6g}, among others {beside:.6g}); give "
        "its normalisation running statistics, or replace it by group normalisation"
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


def compared(take: Callable[[str], Tensor], truth: Iterable[Mapping[str, Tensor]]) -> Errors:
    """How far our sums are from the truth.

    `take(name)` gives up our sum, `truth` comes in groups, so that neither is held for all.
    """
    errors: Errors = {}
    for group in truth:
        for name, expected in group.items():
            sizes = (0.0, 0.0)
            if expected.numel():
                difference = take(name).sub_(expected).abs_().max()
                sizes = float(difference), float(expected.max())
            errors[name] = (*sizes, expected.dtype)
    return errors


def largest(errors: Errors) -> float:
    """The largest entry of all parameters."""
    return max((size for _, size, _ in errors.values()), default=0.0)


def disagreements(errors: Errors, model_largest: float, coarse: bool = False) -> dict[str, str]:
    """The parameters whose sums differ from the truth by more than rounding, each with by how
    much."""
    wrong: dict[str, str] = {}
    for name, (error, own, dtype) in errors.items():
        scale = max(own, ZERO.get(dtype, 1e-6) * model_largest)
        tolerance = (COARSE if coarse else TOLERANCE).get(dtype, 0.1)
        if not error <= tolerance * scale:
            wrong[name] = f"self-check: off by {error / scale if scale else error:.1e}"
    return wrong
