"""Choose gamma without test data: the one that, tried on a copy, comes closest to what a retrained
model would show.

A model retrained without D_f meets the forget samples as it meets new data, never predicts a class
that it did not see, and else is as right as before. That is all known without retraining: from the
original model and held-out data.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data, Samples, refuse_shared_indices, samples_of
from deepclean_hooks.guard.guard import NormStatistics
from deepclean_hooks.measure.request import Measured, measured
from deepclean_hooks.methods import DEFAULT
from deepclean_hooks.methods.method import Method
from deepclean_hooks.metrics.outputs import Outputs, collect
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks import fsdp
from deepclean_hooks.tuning import copies
from deepclean_hooks.tuning.gamma_sweep import GAMMAS, grid

TRAINED = 2048  # retain samples that a trial trains on, once, in batches of BATCH
BATCH = 32
JUDGED = 2000  # samples of each set that a trial is judged on, at most
LR = 1e-3  # Adam, cosine to 0: the paper's fine-tune
BUDGET = 10.0  # percentage points of retain accuracy that a trial may lose
SEED = 0

RULE = (
    "of the gammas that, reset and trained for a moment on a slice of the retain set, lose at most "
    f"{BUDGET:g} percentage points of retain accuracy, the one whose accuracies are on average "
    "closest to those expected of a retrained model: on forget samples of classes that the retain "
    "set does not hold 0, on the others what the original has on held-out samples of their "
    "classes, on held-out and retain samples what the original has; the largest of equals"
)


@dataclass(frozen=True)
class Behaviour:
    """How a model meets the sets; accuracies in per cent, losses in nats a sample.

    `new_class_accuracy`: on the forget samples whose class the retain set does not hold;
    `forget_accuracy` and `forget_loss`: on the others; `held_out_accuracy` and `held_out_loss`: on
    held-out samples of the others' classes, with the standard errors of the two differences. None
    where there are no such samples. `retain_accuracy`: on retain samples that no trial trains on.
    """

    retain_accuracy: float
    new_class_accuracy: float | None = None
    forget_accuracy: float | None = None
    forget_loss: float | None = None
    held_out_accuracy: float | None = None
    held_out_loss: float | None = None
    accuracy_error: float | None = None
    loss_error: float | None = None

    def distance(self, original: Behaviour) -> float:
        """The mean distance of these accuracies, in percentage points, to those that a retrained
        model is expected to have."""
        pairs = [
            (self.retain_accuracy, original.retain_accuracy),
            (self.new_class_accuracy, 0.0),
            (self.forget_accuracy, original.held_out_accuracy),
            (self.held_out_accuracy, original.held_out_accuracy),
        ]
        return statistics.fmean(
            abs(own - aim) for own, aim in pairs if own is not None and aim is not None
        )

    def as_unseen(self, classes: int) -> bool:
        """Whether the forget samples are met as data that were never trained on: of new classes at
        most half of chance is right, and the others are no better known than held-out ones, up to
        one standard error of the difference, by accuracy and by loss."""
        if self.new_class_accuracy is not None and self.new_class_accuracy > 50 / classes:
            return False
        if self.forget_accuracy is None:
            return True
        assert self.forget_loss is not None
        assert self.held_out_accuracy is not None
        assert self.held_out_loss is not None
        assert self.accuracy_error is not None
        assert self.loss_error is not None
        return (
            self.forget_accuracy <= self.held_out_accuracy + self.accuracy_error
            and self.forget_loss >= self.held_out_loss - self.loss_error
        )


@dataclass(frozen=True)
class GammaTrial:
    """One gamma of the grid: the size of W_f, how the model then met the sets, how far that is
    from what is expected of a retrained model, and whether it met D_f as unseen data."""

    gamma: float
    selected_entries: int
    behaviour: Behaviour
    distance: float
    as_unseen: bool


@dataclass(frozen=True)
class GammaChoice:
    """The gamma chosen, why, and the trials in rising order of gamma; `original`: the model as it
    was; `method`: the method with this gamma."""

    method: Method
    trials: tuple[GammaTrial, ...]
    original: Behaviour
    reason: str
    met: bool
    rule: str = RULE

    @property
    def gamma(self) -> float:
        """The number."""
        return self.method.number

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for the report."""
        return {
            "gamma": self.gamma,
            "rule": self.rule,
            "met": self.met,
            "reason": self.reason,
            "original": dataclasses.asdict(self.original),
            "trials": [dataclasses.asdict(one) for one in self.trials],
        }

    def __str__(self) -> str:
        """The reason and a line for each gamma."""
        lines = [f"gamma {self.gamma:g}: {self.reason}"]
        for one in self.trials:
            figures = dataclasses.asdict(one.behaviour).items()
            told = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in figures if v is not None)
            known = "as unseen" if one.as_unseen else "still known"
            lines.append(
                f"  {one.gamma:g}: {one.selected_entries} entries, distance {one.distance:.2f}, "
                f"{known}; {told}"
            )
        return "\n".join(lines)


def choose_gamma(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    held_out: Data | None = None,
    gammas: Sequence[float] = GAMMAS,
    method: Method | None = None,
    loss_fn: LossFn | None = None,
    norm_statistics: NormStatistics = "update",
    batch_size: int | None = None,
    collate_fn: Any = None,
    progress: bool = True,
) -> GammaChoice:
    """The gamma that `DeepClean(gamma="auto")` would take, with the table it is read from; the
    model is left as it was.

    `held_out`: data of the same kind that the model was not trained on and that are not the test
    set, needed unless every forget sample is of a class that the retain set does not hold. The
    Fisher diagonals are measured once. Each gamma costs a copy of the model, Adam steps on 2,048
    retain samples and forward passes over at most 2,000 samples of each set; a label is read of
    every retain sample. Raises ValueError if `held_out` is missing, or holds no sample of the
    classes in question.
    """
    base = method or DEFAULT
    given = {"forget": forget, "retain": retain, "held_out": held_out}
    sets = {
        name: samples_of(data, name=name, batch_size=batch_size, collate_fn=collate_fn)
        for name, data in given.items()
        if data is not None
    }
    refuse_shared_indices(sets)
    require_whole(model)
    methods = grid(base, gammas)
    trials = Trials(sets["forget"], sets["retain"], sets.get("held_out"))
    found = measured(
        base,
        model,
        sets["forget"],
        sets["retain"],
        loss_fn=loss_fn or losses.cross_entropy,
        progress=progress,
    )
    return trials.choose(
        model,
        methods,
        found,
        loss_fn=loss_fn or losses.cross_entropy,
        norm_statistics=norm_statistics,
    )


def trials_of(method: Method, sets: Mapping[str, Samples], **reading: Any) -> Trials:
    """The trials of a session whose method is open; `reading` is how its held-out data are read.

    Raises ValueError where the retain set is not at hand, or as `Trials` does.
    """
    if "retain" not in sets:
        raise ValueError(
            'gamma="auto" trains copies of the model on retain samples, and a stored '
            "measurement has none; pass the retain set, or give gamma a number"
        )
    data = method.trial_data
    held_out = None if data is None else samples_of(data, name="held_out", **reading)
    return Trials(sets["forget"], sets["retain"], held_out)


def require_whole(model: nn.Module) -> None:
    """Raises ValueError for a sharded model, of which no rank can try a copy."""
    if fsdp.is_sharded(unwrap(model)):
        raise ValueError(
            f'gamma="auto" tries copies of the model, and the parameters of {type(model).__name__} '
            "are sharded (fully_shard, FSDP2); call choose_gamma() before fully_shard(), and give "
            "gamma that number"
        )


class Trials:
    """The slices of the data that every gamma is tried on."""

    def __init__(self, forget: Samples, retain: Samples, held_out: Samples | None) -> None:
        """Raises ValueError where the sets cannot answer the question, before any model runs."""
        self.retained = _classes(retain, "retain")
        forgotten = _classes(forget, "forget")
        self.classes = len(self.retained | forgotten)
        shared = forgotten & self.retained
        if shared and held_out is None:
            raise ValueError(
                f'gamma="auto" compares the forget samples of the classes {sorted(shared)[:5]}, '
                "which the retain set holds too, with data that the model was not trained on; "
                'pass them as DeepClean(gamma="auto", held_out=validation), or give gamma a number'
            )
        if shared and held_out is not None:
            missing = sorted(shared - _classes(held_out, "held_out"))
            if missing:
                raise ValueError(
                    f"held_out holds no sample of the forgotten classes {missing[:5]}; add some, "
                    "or give gamma a number"
                )
        trained, judged = _slices(retain)
        self.trained = dataclasses.replace(trained, batch_size=BATCH)
        self.sets = {"forget": _few(forget, "forget"), "retain": judged}
        if shared and held_out is not None:
            self.sets["held_out"] = _few(held_out, "held_out")

    def choose(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        measured: Measured,
        *,
        loss_fn: LossFn,
        norm_statistics: NormStatistics,
    ) -> GammaChoice:
        """Tries every method, in rising order of gamma, on copies of the model."""

        def train(pupil: nn.Module) -> None:
            _fine_tune(pupil, self.trained, loss_fn)

        original = self.behaviour(model)
        tried = []
        for one in methods:
            selection = one.select(measured.forget, measured.retain)
            copied = copies.reset(model, one, selection, measured)
            free = one.free(selection)
            if any(bool(mask.any()) for mask in free.values()):
                copies.tune(copied, free, train, norm_statistics)
            count = selection.entries()
            found = self.behaviour(copied)
            unseen = found.as_unseen(self.classes)
            far = found.distance(original)
            tried.append(GammaTrial(one.number, count, found, far, unseen))
        position, reason = verdict(tried, original)
        met = tried[position].as_unseen
        return GammaChoice(methods[position], tuple(tried), original, reason, met)

    def behaviour(self, model: nn.Module) -> Behaviour:
        """How a model meets the sets."""
        outputs = {name: collect(model, source, name) for name, source in self.sets.items()}
        forget = outputs["forget"]
        known = torch.isin(forget.labels, torch.tensor(sorted(self.retained)))
        figures: dict[str, float] = {"retain_accuracy": _accuracy(outputs["retain"])}
        if not bool(known.all()):
            figures["new_class_accuracy"] = _accuracy(forget.at(~known))
        if bool(known.any()):
            ours, theirs = forget.at(known), outputs["held_out"]
            theirs = theirs.at(torch.isin(theirs.labels, ours.labels))
            figures |= _compared(ours, theirs)
        return Behaviour(**figures)


def verdict(tried: Sequence[GammaTrial], original: Behaviour) -> tuple[int, str]:
    """(position of the trial taken, why), from trials in rising order of gamma."""
    least = original.retain_accuracy - BUDGET
    affordable = [i for i, one in enumerate(tried) if one.behaviour.retain_accuracy >= least]
    if not affordable:
        best = max(range(len(tried)), key=lambda i: tried[i].behaviour.retain_accuracy)
        return best, (
            f"every gamma of the grid cost more than {BUDGET:g} points of retain accuracy; this "
            "one the least: set an upper limit, DeepClean(..., max_selected=0.05), or train longer"
        )
    best = min(affordable, key=lambda i: (tried[i].distance, -tried[i].gamma))
    told = "the closest to what is expected of a retrained model"
    if tried[best].as_unseen:
        return best, told
    return best, f"{told}, but D_f was still better known than unseen data in its trial"


def _compared(ours: Outputs, theirs: Outputs) -> dict[str, float]:
    """The figures of forget samples beside held-out ones, and the errors of their differences."""
    pairs = [(one.correct.double() * 100, one.loss) for one in (ours, theirs)]
    accuracy, loss = (_standard_error(*column) for column in zip(*pairs, strict=True))
    return {
        "forget_accuracy": _accuracy(ours),
        "forget_loss": float(ours.loss.mean()),
        "held_out_accuracy": _accuracy(theirs),
        "held_out_loss": float(theirs.loss.mean()),
        "accuracy_error": accuracy,
        "loss_error": loss,
    }


def _standard_error(one: Tensor, other: Tensor) -> float:
    parts = [float(x.var()) / len(x) if len(x) > 1 else 0.0 for x in (one, other)]
    return math.sqrt(sum(parts))


def _accuracy(outputs: Outputs) -> float:
    return 100 * float(outputs.correct.double().mean())


def _fine_tune(pupil: nn.Module, source: Samples, loss_fn: LossFn) -> None:
    """Trains on every sample of a slice once: Adam, cosine to 0."""
    device = no_trace.device_of(pupil)
    loader = source.shuffled(SEED)
    trained = [p for p in pupil.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), no_trace.training(pupil):
        torch.manual_seed(SEED)
        for batch in loader:
            batch = batches.to(batch, device)
            loss: Any = losses.per_sample(loss_fn(pupil, batch), batches.size(batch)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def _slices(retain: Samples) -> tuple[Samples, Samples]:
    """Retain samples to train on, and others to judge by; of a small set half each."""
    order = _drawn(retain, "retain")
    cut = min(TRAINED, -(-len(order) // 2))
    parts = order[:cut], order[cut : cut + JUDGED] or order
    trained, judged = (dataclasses.replace(retain, indices=tuple(part)) for part in parts)
    return trained, judged


def _few(source: Samples, name: str) -> Samples:
    return dataclasses.replace(source, indices=tuple(_drawn(source, name)[:JUDGED]))


def _drawn(source: Samples, name: str) -> list[int]:
    """The indices in an order that is the same on every rank."""
    if source.indices is None:
        raise ValueError(
            f'gamma="auto" draws a slice of {name}, which needs samples with indices; pass a '
            "Dataset with a length, or give gamma a number"
        )
    order = torch.randperm(len(source.indices), generator=torch.Generator().manual_seed(SEED))
    return [source.indices[i] for i in order.tolist()]


def _classes(source: Samples, name: str) -> set[int]:
    """The classes that occur among a set's labels, over all ranks."""
    with ranks.fail_together():
        mine = {int(one) for batch in source.batches() for one in _labels(batch, name)}
    return set().union(*ranks.gather(mine))


def _labels(batch: Batch, name: str) -> list[int]:
    labels = batches.labels_of(batch)
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        raise TypeError(
            f'gamma="auto" reads class labels, which the batches of {name} do not have; yield '
            "(x, y) or a mapping with 'labels', or give gamma a number"
        )
    return list(set(labels.tolist()))
