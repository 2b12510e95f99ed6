"""Choose gamma without test data: the one that, tried on a copy, comes closest to what a retrained
model would show.

A model retrained without D_f meets the forget samples as it meets new data, never predicts a class
that it did not see, and else is as right as before. That is all known without retraining: from the
original model and held-out data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data, Samples, samples_of, sets_of
from deepclean_hooks.guard.guard import NormStatistics
from deepclean_hooks.measure.request import Measured, measured
from deepclean_hooks.methods import DEFAULT
from deepclean_hooks.methods.method import Method
from deepclean_hooks.metrics.outputs import Outputs, collect
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks import fsdp
from deepclean_hooks.tuning import copies
from deepclean_hooks.tuning.choice import Behaviour, GammaChoice, GammaTrial, verdict
from deepclean_hooks.tuning.gamma_sweep import GAMMAS, grid

TRAINED = 2048  # retain samples that a trial trains on, once, in batches of BATCH
BATCH = 32
JUDGED = 2000  # samples of each set that a trial is judged on, at most
LR = 1e-3  # Adam, cosine to 0: the paper's fine-tune
SEED = 0


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
    sets = sets_of(given, batch_size=batch_size, collate_fn=collate_fn)
    require_whole(model)
    methods = grid(base, gammas)
    trials = Trials(sets["forget"], sets["retain"], sets.get("held_out"))
    loss = loss_fn or losses.cross_entropy
    found = measured(base, model, sets["forget"], sets["retain"], loss_fn=loss, progress=progress)
    return trials.choose(
        model,
        methods,
        found,
        loss_fn=loss,
        norm_statistics=norm_statistics,
    )


def trials_of(
    method: Method, model: nn.Module, sets: Mapping[str, Samples], **reading: Any
) -> Trials | None:
    """The trials of a session if its method is open; `reading` is how its held-out data are read.

    Raises ValueError where the retain set is not at hand, for a sharded model, or as `Trials` does.
    """
    if not method.is_open:
        return None
    require_whole(model)
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
