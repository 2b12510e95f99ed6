"""U-LiRA and KLoM: what pools of unlearned and of retrained models, each of another seed, say of
single samples.

M: models of a pool, N: forget samples. Both read margins (M, N), as `margins` gives them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks.data.samples import Data, samples_of
from deepclean_hooks.metrics.attack import Attack, ranked
from deepclean_hooks.metrics.outputs import collect

CLIP = 100.0
BINS = 20
FLOOR = 1e-5  # probability added to each bin of KLoM
_LEAST_DEVIATION = 1e-3  # of a sample's margins: models that all agree give no Gaussian


def margins(
    models: Iterable[nn.Module],
    data: Data,
    *,
    batch_size: int | None = None,
    collate_fn: Any = None,
) -> Tensor:
    """z_y - logsumexp of the other logits, of each model on each sample, (M, N) float64.

    Only one model is held at a time, so `models` may be a generator. Equal to logit(p_y), the
    rescaled logit of LiRA, in a form that does not overflow.
    """
    source = samples_of(data, name="data", batch_size=batch_size, collate_fn=collate_fn)
    rows = [collect(model, source, "data").margin.clamp(-CLIP, CLIP) for model in models]
    if not rows:
        raise ValueError("margins needs at least one model, none was given")
    return torch.stack(rows)


def ulira(unlearned: Tensor, retrained: Tensor) -> Attack:
    """U-LiRA (Hayes et al., arXiv 2403.01218): per forget sample, was this model trained with it
    and then unlearned, or never trained with it?

    `unlearned` (M1, N): margins of models unlearned after training with the samples; `retrained`
    (M2, N): of models trained without them. Each model is judged by Gaussians fitted to all others.
    """
    attack = Attack(
        feature="margin (rescaled logit) of the true label",
        attacker="likelihood ratio of two Gaussians, one pair for each sample",
        fitted_on=f"{len(unlearned)} unlearned and {len(retrained)} retrained models, each judged "
        "by a fit on the others",
        orientation="accuracy in per cent: 50 is best, 100 means that each sample tells an "
        "unlearned model from a retrained one; auc: 0.5 is best; tpr: of the unlearned models, in "
        "per cent",
    )
    _require_pools(unlearned, retrained)
    if min(len(unlearned), len(retrained)) < 3:
        reason = f"it needs 3 models of a kind, got {len(unlearned)} and {len(retrained)}"
        return replace(attack, reasons={"auc": reason, "accuracy": reason})
    unlearned, retrained = (m.double().clamp(-CLIP, CLIP) for m in (unlearned, retrained))
    members = torch.stack(
        [_log_ratio(row, _without(unlearned, i), retrained) for i, row in enumerate(unlearned)]
    )
    others = torch.stack(
        [_log_ratio(row, unlearned, _without(retrained, i)) for i, row in enumerate(retrained)]
    )
    judged = ranked(attack, members.flatten(), others.flatten())
    right = [_share_above(members), 1 - _share_above(others)]
    return replace(judged, figures={**judged.figures, "accuracy": 50 * sum(right)})


def _log_ratio(margin: Tensor, unlearned: Tensor, retrained: Tensor) -> Tensor:
    """log p(margin | unlearned) - log p(margin | retrained) for each sample, (N,)."""

    def log_density(pool: Tensor) -> Tensor:
        deviation = pool.std(dim=0).clamp_min(_LEAST_DEVIATION)
        return -0.5 * ((margin - pool.mean(dim=0)) / deviation) ** 2 - deviation.log()

    return log_density(unlearned) - log_density(retrained)


def _share_above(ratios: Tensor) -> float:
    # A tie says nothing: half of it counts.
    return float((ratios > 0).double().mean() + 0.5 * (ratios == 0).double().mean())


def _without(pool: Tensor, index: int) -> Tensor:
    return torch.cat([pool[:index], pool[index + 1 :]])


@dataclass(frozen=True)
class KLoM:
    """KL divergence of margins, unlearned from retrained, in nats: mean and 95th percentile over
    the samples; `per_sample` (N,).

    `floor_mean` and `floor_percentile_95` are the same between two halves of the retrained models:
    what no method can beat. None with fewer than four of these.
    """

    mean: float
    percentile_95: float
    floor_mean: float | None
    floor_percentile_95: float | None
    models: tuple[int, int]
    per_sample: Tensor


def klom(unlearned: Tensor, retrained: Tensor) -> KLoM:
    """KL(unlearned || retrained) of each sample's margins, (M1, N) and (M2, N), in 20 bins.

    Bins are of equal width between the smallest and the largest margin of the sample in both pools,
    both included; 1e-5 is added to each bin's share. The floor compares halves, whose fewer models
    make it higher than that of pools of full size.
    """
    _require_pools(unlearned, retrained)
    values = _divergence(unlearned, retrained)
    floor = None
    if len(retrained) >= 4:
        floor = _divergence(retrained[::2], retrained[1::2])
    return KLoM(
        float(values.mean()),
        float(values.quantile(0.95)),
        None if floor is None else float(floor.mean()),
        None if floor is None else float(floor.quantile(0.95)),
        (len(unlearned), len(retrained)),
        values,
    )


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    first, second = (m.double().clamp(-CLIP, CLIP) for m in (first, second))
    both = torch.cat([first, second])
    low, high = both.min(dim=0).values, both.max(dim=0).values
    p, q = (_shares(pool, low, high) for pool in (first, second))
    return (p * (p / q).log()).sum(dim=0)


def _shares(pool: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The share of models in each bin, (BINS, N), the largest margin in the last bin."""
    width = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    at = ((pool - low) / width * BINS).long().clamp(0, BINS - 1)  # (M, N)
    counts = torch.zeros(BINS, pool.shape[1], dtype=torch.float64)
    counts.scatter_add_(0, at, torch.ones_like(pool))
    shares = counts / len(pool) + FLOOR
    return shares / shares.sum(dim=0)


def _require_pools(unlearned: Tensor, retrained: Tensor) -> None:
    for name, pool in (("unlearned", unlearned), ("retrained", retrained)):
        if pool.dim() != 2 or not pool.numel():
            raise ValueError(f"{name} must be margins (models, samples), got {tuple(pool.shape)}")
        if not torch.isfinite(pool).all():
            raise ValueError(f"{name} holds margins that are NaN or infinite")
    if unlearned.shape[1] != retrained.shape[1]:
        raise ValueError(
            f"both pools must be of the same samples, got {unlearned.shape[1]} unlearned and "
            f"{retrained.shape[1]} retrained margins a model"
        )
