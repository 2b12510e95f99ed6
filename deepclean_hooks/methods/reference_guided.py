"""Reference-guided unlearning: on the forget set the model learns to answer as the original does
on data that it has not seen.

N: this rank's samples of a forget batch, B: those of all ranks, C: classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks.data import losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data, samples_of
from deepclean_hooks.measure.answers import Answers, answers
from deepclean_hooks.methods.additive import Additive
from deepclean_hooks.methods.settings import require_positive
from deepclean_hooks.methods.term import Drawn, Original, Term


@dataclass(frozen=True)
class ReferenceGuided(Additive):
    """Adds `weight` * KL(target || model) on D_f to your loss on D_r; targets are what the original
    model answers on `held_out`, data of the same kind that it was not trained on.

    `match="rank"`: each forget sample gets the answer to one held-out sample of its class. Both are
    sorted by the original's loss and paired at equal quantiles, so that D_f ends with the whole
    distribution of answers that unseen data get, its confident and its wrong ones.
    `match="mean"`: all samples of a forget batch get one answer, the mean over held-out samples in
    the proportions of the batch's classes. Mirlach, Laguna, Vogt: "Reference-Guided Machine
    Unlearning", 2026 (arXiv 2603.11210), with the original as the reference model; they draw as
    many held-out samples as the batch has, here the mean is over all of them.

    `held_out` is read in the forget set's batches unless it is a loader. Every class of the forget
    set needs held-out samples: ValueError names those without, before anything is changed. The
    forget batches run through the model in eval mode.
    """

    held_out: Data = field(repr=False, compare=False)
    match: Literal["rank", "mean"] = "rank"
    weight: float = 0.5
    name = "reference-guided"

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown match and a weight that is no positive number."""
        super().__post_init__()
        require_positive(weight=self.weight)
        if self.match not in ("rank", "mean"):
            raise ValueError(f'match must be "rank" or "mean", got {self.match!r}')

    def term(self) -> Term:
        """The divergence on forget batches."""
        return _Guided(self)


class _Guided(Term):
    evaluates = True

    def __init__(self, method: ReferenceGuided) -> None:
        self._method, self.seed = method, method.seed
        self._targets: dict[str, Tensor] = {}

    def prepare(self, original: Original) -> None:
        """The original's answers on both sets; raises ValueError for classes without held-out
        samples and for held-out samples that the model was trained on."""
        gone = original.forget
        held_out = samples_of(
            self._method.held_out,
            name="held_out",
            batch_size=gone.batch_size,
            collate_fn=gone.collate_fn,
        )
        how = {"progress": original.progress}
        unseen = answers(original.model, held_out, "held_out", **how)
        _require_unseen(unseen, original.seen)
        forget = answers(original.model, gone, "forget", **how)
        _require_classes(forget, unseen)
        make = _by_rank if self._method.match == "rank" else _by_mean
        self._targets = make(forget, unseen)

    def losses(self, model: nn.Module, loss_fn: LossFn, drawn: Drawn) -> Tensor:
        """The weighted divergence of each sample."""
        logits, _ = losses.logits_and_labels(model, drawn.batch)  # (N, C)
        target = self._of(drawn).to(logits.device)  # (N, C) or (C,)
        exact = logits if logits.dtype == torch.float64 else logits.float()
        log_p = F.log_softmax(exact, dim=1)
        each = F.kl_div(log_p, target.expand_as(log_p), reduction="none").sum(1)
        return self._method.weight * each

    def _of(self, drawn: Drawn) -> Tensor:
        if "of_sample" in self._targets:
            return self._targets["of_sample"][drawn.whole[drawn.mine]]
        labels = self._targets["labels"][drawn.whole]
        return self._targets["of_class"][labels].mean(0)

    def state_dict(self) -> dict[str, Tensor]:
        """The targets."""
        return dict(self._targets)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The targets of the stored run."""
        self._targets = dict(state)


def _by_rank(forget: Answers, unseen: Answers) -> dict[str, Tensor]:
    """For each forget sample the answer to the held-out sample of its class at the same quantile of
    the original's loss: {"of_sample": (N, C)}."""
    targets = unseen.probabilities.new_empty(len(forget.labels), unseen.probabilities.shape[1])
    for label in sorted(set(forget.labels.tolist())):
        here = (forget.labels == label).nonzero().squeeze(1)
        there = (unseen.labels == label).nonzero().squeeze(1)
        here = here[forget.losses[here].argsort(stable=True)]
        there = there[unseen.losses[there].argsort(stable=True)]
        middle = (torch.arange(len(here), dtype=torch.float64) + 0.5) / len(here)
        targets[here] = unseen.probabilities[there[(middle * len(there)).long()]]
    return {"of_sample": targets}


def _by_mean(forget: Answers, unseen: Answers) -> dict[str, Tensor]:
    """The mean answer to the held-out samples of each class, and the class of each forget sample:
    {"of_class": (C, C), "labels": (N,)}."""
    classes = unseen.probabilities.shape[1]
    means = unseen.probabilities.new_zeros(classes, classes)
    for label in sorted(set(forget.labels.tolist())):
        means[label] = unseen.probabilities[unseen.labels == label].mean(0)
    return {"of_class": means, "labels": forget.labels}


def _require_unseen(unseen: Answers, seen: Tensor) -> None:
    shared = int(torch.isin(unseen.fingerprints, seen).sum())
    if shared:
        raise ValueError(
            f"{shared} of the {len(unseen.labels)} samples of held_out stand in the forget or the "
            "retain set with the same content; held_out must be data that the model was not "
            "trained on"
        )


def _require_classes(forget: Answers, unseen: Answers) -> None:
    missing = sorted(set(forget.labels.tolist()) - set(unseen.labels.tolist()))
    if missing:
        raise ValueError(
            f"held_out has no sample of {len(missing)} of the forget set's classes, "
            f"{', '.join(map(str, missing[:5]))}{', ...' if missing[5:] else ''}; add some of each "
            "that the model was not trained on"
        )
