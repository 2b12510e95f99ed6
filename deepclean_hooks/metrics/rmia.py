"""RMIA, the pairwise likelihood-ratio attack of Zarifzadeh, Liu and Shokri (arXiv 2312.03262), with
gold models as its references.

N: samples, Z: population samples, K: reference models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepclean_hooks.metrics.attack import Attack, ranked, unseen_like
from deepclean_hooks.metrics.outputs import Outputs

GAMMA = 2.0  # how many times more likely than z the sample must have become: the paper's value
OFFLINE = 0.3  # a in p(x) = ((1 + a) p_out(x) + 1 - a) / 2: the paper's value for CIFAR-10
MOST_POPULATION = 2000
_TINY = torch.finfo(torch.float64).tiny

Sets = dict[str, Outputs]


def scores(
    target: Tensor, reference: Tensor, population: Tensor, population_reference: Tensor
) -> Tensor:
    """The share of the population that each sample dominates, (N,): higher for members.

    `target` (N,) and `population` (Z,): probabilities of the true label under the model attacked;
    `reference` and `population_reference`: the same under models that saw neither, mean of K.
    """

    def ratio(under: Tensor, out: Tensor) -> Tensor:
        expected = ((1 + OFFLINE) * out + 1 - OFFLINE) / 2
        return under.clamp_min(_TINY) / expected.clamp_min(_TINY)

    beaten = (ratio(population, population_reference) * GAMMA).sort().values  # (Z,)
    # Strictly more than gamma times as likely: entries of `beaten` below the sample's ratio.
    below = torch.searchsorted(beaten, ratio(target, reference), side="left")
    return below.double() / max(len(beaten), 1)


def rmia(model: Sets, references: Sequence[Sets]) -> Attack:
    """The attack on one model; every reference was trained without the forget set."""
    unseen, words = unseen_like(model)
    attack = Attack(
        feature="likelihood ratio of the true label's probability, model over reference models, "
        f"against that of other unseen samples (gamma {GAMMA:g}, offline a {OFFLINE:g})",
        attacker="a threshold on the share of unseen samples that it dominates",
        fitted_on=f"{len(references)} gold models as references; the population is every second of "
        f"{words}, the others are the non-members",
        orientation="auc: 0.5 is best, 1 means every forget sample is known as a member; tpr: per "
        "cent of the forget samples called members at that false positive rate",
    )
    if unseen is None:
        return attack.without("auc", words)
    if not references:
        reason = "it needs reference models: pass gold=[...]; a gold model needs another gold"
        return attack.without("auc", reason)
    if len(unseen.confidence) < 4:
        count = len(unseen.confidence)
        return attack.without("auc", f"it needs 4 unseen samples, there are {count}")
    outs = [_confidences(reference) for reference in references]
    forget_out = torch.stack([forget for forget, _ in outs]).mean(0)  # (N,)
    unseen_out = torch.stack([unseen for _, unseen in outs]).mean(0)  # (2 Z,)
    population = torch.arange(0, len(unseen.confidence), 2)
    others = population + 1
    others = others[others < len(unseen.confidence)]
    population = population[:MOST_POPULATION]

    def scored(under: Tensor, out: Tensor) -> Tensor:
        return scores(under, out, unseen.confidence[population], unseen_out[population])

    members = scored(model["forget"].confidence, forget_out)
    return ranked(attack, members, scored(unseen.confidence[others], unseen_out[others]))


def _confidences(sets: Sets) -> tuple[Tensor, Tensor]:
    unseen, words = unseen_like(sets)
    if unseen is None:
        raise ValueError(f"a gold model's outputs cannot serve as reference: {words}")
    return sets["forget"].confidence, unseen.confidence
