"""How far a model's outputs on the forget set are from another model's.

N: samples, C: classes. Logits come in as (N, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """A figure with what it means; `value` is None where `reason` says why."""

    meaning: str
    value: float | None = None
    reason: str | None = None
    gold_to_gold: float | None = None


def js_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each sample's two softmax outputs in bits, (N,), 0 to 1."""
    p, q = (torch.log_softmax(logits.double(), dim=1) for logits in (first, second))
    middle = torch.logaddexp(p, q) - math.log(2)
    # Summed over the classes: kl_div's "mean", as in SSD's code, divides by C as well.
    divergence = (_kl(p, middle) + _kl(q, middle)) / 2
    return (divergence / math.log(2)).clamp(0, 1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    terms = p.exp() * (p - q)
    return torch.where(p.exp() > 0, terms, 0.0).sum(dim=1)


def activation_distance(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distance of each sample's two softmax outputs, (N,), 0 to sqrt(2)."""
    p, q = (torch.softmax(logits.double(), dim=1) for logits in (first, second))
    return (p - q).square().sum(dim=1).sqrt()


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Per sample 100 where both predict the same class and 0 where not, (N,): mean in per cent."""
    return 100 * (first.argmax(dim=1) == second.argmax(dim=1)).double()


Distance = Callable[[Tensor, Tensor], Tensor]

TO_GOLD: dict[str, tuple[str, Distance]] = {
    "js_divergence": (
        "mean Jensen-Shannon divergence to the gold model's outputs on the forget set in bits: 0 "
        "is the same, 1 has nothing in common",
        js_divergence,
    ),
    "activation_distance": (
        "mean Euclidean distance to the gold model's softmax outputs on the forget set: 0 is the "
        "same, 1.41 the most",
        activation_distance,
    ),
    "completeness": (
        "per cent of the forget samples for which the gold model predicts the same class: 100 is "
        "best",
        agreement,
    ),
}
ZRF = (
    "zero retrain forgetting: 1 - mean Jensen-Shannon divergence (bits) on the forget set to the "
    "outputs of an untrained model; the aim is the gold model's figure, not 1"
)


def to_gold(logits: Tensor | None, golds: list[Tensor | None], why: str) -> dict[str, Measured]:
    """Each figure of TO_GOLD as the mean over gold models, and between these; `why` none."""
    known = [gold for gold in golds if gold is not None]
    distances = {}
    for name, (meaning, distance) in TO_GOLD.items():
        if logits is None or not known:
            distances[name] = Measured(meaning, reason=why)
            continue
        pairs = [(a, b) for i, a in enumerate(known) for b in known[:i]]
        among = [float(distance(a, b).mean()) for a, b in pairs]
        value = sum(float(distance(logits, gold).mean()) for gold in known) / len(known)
        distances[name] = Measured(
            meaning, value, gold_to_gold=sum(among) / len(among) if among else None
        )
    return distances


def zrf(logits: Tensor | None, untrained: Tensor | None, why: str) -> Measured:
    """Zero retrain forgetting of a model's logits against an untrained model's."""
    if logits is None or untrained is None:
        return Measured(ZRF, reason=why)
    return Measured(ZRF, 1 - float(js_divergence(logits, untrained).mean()))
