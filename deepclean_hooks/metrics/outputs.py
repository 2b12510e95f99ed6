"""A forward pass of a model over a set: what is kept of it for every figure.

N: samples of the set, C: classes, D: features before the last linear layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.data.walk import walk, walk_together
from deepclean_hooks.model import no_trace
from deepclean_hooks.ranks import fsdp

MOST_LOGITS = 2**25  # entries of one set, 128 MiB in float32; a larger set keeps none
MOST_FEATURES = 2000  # samples of one set whose features are kept, evenly spread over it
_COLUMNS = 8


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on a set, sample by sample in index order, on the CPU.

    `loss`, `entropy` and `modified_entropy` in nats; `confidence`: the probability of the sample's
    own label; `highest`: that of the predicted one; `margin`: z_y - logsumexp of the other logits.
    `logits` (N, C) and `features` (M, D) of the samples at `positions` are None where they were not
    asked for or could not be had; `reasons` then says why.
    """

    labels: Tensor  # (N,) int64
    predicted: Tensor  # (N,) int64
    loss: Tensor  # (N,) float64, as all below
    entropy: Tensor
    modified_entropy: Tensor
    confidence: Tensor
    highest: Tensor
    margin: Tensor
    logits: Tensor | None = None
    features: Tensor | None = None
    positions: Tensor | None = None
    reasons: tuple[str, ...] = ()

    @property
    def correct(self) -> Tensor:
        """Whether the predicted class is the label, (N,) bool."""
        return self.predicted == self.labels

    def at(self, chosen: Tensor) -> Outputs:
        """The outputs of some samples, by a mask or positions (N,); without logits and features."""
        return Outputs(
            self.labels[chosen],
            self.predicted[chosen],
            self.loss[chosen],
            self.entropy[chosen],
            self.modified_entropy[chosen],
            self.confidence[chosen],
            self.highest[chosen],
            self.margin[chosen],
        )


def collect(
    model: nn.Module,
    source: Samples,
    name: str,
    *,
    logits: bool = False,
    features: bool = False,
    progress: str | None = None,
) -> Outputs:
    """Runs the model over a set once, each sample once over all ranks, and leaves it as it was.

    `progress` labels a bar. Raises ValueError for an empty set and for outputs that are NaN.
    """
    with no_trace.no_trace(model) as inner, no_trace.float32_weights(inner) as dtype:
        kept = _Kept(source, name, logits, features)
        device = no_trace.device_of(inner)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "progress": progress}
        if fsdp.is_sharded(inner):
            with _watched(inner, features) as seen:
                for batch, counted in walk_together(source, **how):
                    with ranks.fail_together(), torch.no_grad():
                        kept.add(inner, batch, seen, counted)
            return kept.outputs()
        with ranks.fail_together(), _watched(inner, features) as seen:
            for batch in walk(source, name=name, **how):
                with torch.no_grad():
                    kept.add(inner, batch, seen, batches.size(batch))
    return kept.outputs()


def scores_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The columns of Outputs from labels to margin for logits (N, C) and labels (N,): (N, 8)."""
    logits = logits.double()
    label = labels.unsqueeze(1)  # (N, 1)
    log_p = torch.log_softmax(logits, dim=1)  # (N, C)
    p = log_p.exp()
    others = logits.scatter(1, label, -torch.inf)
    p_own, p_others = p.gather(1, label).squeeze(1), p.scatter(1, label, 0.0)
    log_p_own = log_p.gather(1, label).squeeze(1)
    # Song and Mittal: log(1 - p_j) for the wrong classes, log p_y times 1 - p_y for the right one.
    wrong = torch.xlogy(p_others, 1 - p_others).sum(dim=1)
    right = torch.nan_to_num(p_others.sum(dim=1) * log_p_own, nan=0.0)
    columns = [
        labels.double(),
        logits.argmax(1).double(),
        -log_p_own,
        torch.special.entr(p).sum(dim=1),
        -(wrong + right),
        p_own,
        p.max(dim=1).values,
        logits.gather(1, label).squeeze(1) - torch.logsumexp(others, dim=1),
    ]
    return torch.stack(columns, 1)


class _Kept:
    """What this rank has kept so far of one set."""

    def __init__(self, source: Samples, name: str, logits: bool, features: bool) -> None:
        self.name, self.count = name, 0
        self.total = None if source.indices is None else len(source.indices)
        self.rows: list[Tensor] = []
        self.logits: list[Tensor] | None = [] if logits else None
        self.features: list[Tensor] | None = [] if features else None
        self.positions: list[Tensor] = []
        self.reasons: list[str] = []

    def add(
        self, model: nn.Module, batch: Batch, seen: list[tuple[Tensor, Tensor]], counted: int
    ) -> None:
        """Runs the batch and keeps what its first `counted` samples gave."""
        seen.clear()
        logits, labels = losses.logits_and_labels(model, batch)
        logits, labels = logits[:counted], labels[:counted]
        if not counted:
            return
        # On the CPU because not every accelerator has float64.
        raw, labels = logits.to("cpu"), labels.to("cpu")
        rows = scores_of(raw, labels)
        bad = torch.isnan(rows).any(dim=1)
        if bad.any():
            raise ValueError(
                f"the model's output for sample {int(bad.nonzero()[0])} of a batch of {self.name} "
                "is NaN or infinite; check the model's weights and the input for NaN or infinity"
            )
        self.rows.append(rows)
        self._keep_logits(raw)
        self._keep_features(logits, seen)
        self.count += len(rows)

    def _keep_logits(self, raw: Tensor) -> None:
        if self.logits is None:
            return
        total = max(self.total or 0, self.count + len(raw))
        if total * raw.shape[1] > MOST_LOGITS:
            self.logits = None
            self.reasons.append(
                f"logits of {total} samples and {raw.shape[1]} classes exceed {MOST_LOGITS} "
                "entries, more than is kept; evaluate a subset of the forget set"
            )
        else:
            self.logits.append(raw)

    def _keep_features(self, logits: Tensor, seen: list[tuple[Tensor, Tensor]]) -> None:
        if self.features is None:
            return
        before = [x for x, y in seen if y.data_ptr() == logits.data_ptr() or _same(y, logits)]
        if not before:
            self.features = None
            self.reasons.append(
                "no linear layer of the model gives the logits, so there are no features before it"
            )
            return
        rank, world = ranks.world()
        at = rank + world * torch.arange(self.count, self.count + len(logits))
        wanted = _spread(at, self.total)
        self.positions.append(at[wanted])
        kept = before[-1][: len(logits)].flatten(1)[wanted.to(logits.device)]
        self.features.append(kept.float().to("cpu"))

    def outputs(self) -> Outputs:
        mine = torch.cat(self.rows) if self.rows else torch.empty(0, _COLUMNS, dtype=torch.float64)
        table = _in_index_order(ranks.gather(mine))
        if not len(table):
            raise ValueError(f"{self.name} is empty: its loader gave 0 samples")
        columns = table.unbind(1)
        reasons = {reason: None for part in ranks.gather(self.reasons) for reason in part}
        logits = _in_index_order(_all(self.logits))
        features, positions = _all(self.features), ranks.gather(self.positions)
        if features:
            at = torch.cat([where for part in positions for where in part])
            order = at.argsort()
            whole = torch.cat(features)[order]
        labels, predicted, loss, entropy, modified, confidence, highest, margin = columns
        return Outputs(
            labels.long(),
            predicted.long(),
            loss,
            entropy,
            modified,
            confidence,
            highest,
            margin,
            logits=logits if len(logits) else None,
            features=whole if features else None,
            positions=at[order] if features else None,
            reasons=tuple(reasons),
        )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _spread(at: Tensor, total: int | None) -> Tensor:
    """True where a position is one of MOST_FEATURES spread evenly over `total`, or, where the total
    is not known, one of the first."""
    if total is None or total <= MOST_FEATURES:
        return at < MOST_FEATURES
    steps = at * MOST_FEATURES // total
    return (steps != (at - 1) * MOST_FEATURES // total) | (at == 0)


def _all(mine: list[Tensor] | None) -> list[Tensor]:
    """Each rank's rows in one tensor; empty if a rank gave up."""
    parts = ranks.gather(mine if mine is None or not mine else torch.cat(mine))
    if any(part is None for part in parts):
        return []
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        return []
    # A rank without samples does not know the width.
    return [part if isinstance(part, Tensor) else tensors[0][:0] for part in parts]


def _in_index_order(parts: list[Tensor]) -> Tensor:
    # Rank r walked the samples r, r + world, ...: put back, sums do not depend on the ranks.
    if not parts:
        return torch.empty(0)
    whole = torch.empty(sum(len(part) for part in parts), *parts[0].shape[1:], dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


@contextlib.contextmanager
def _watched(model: nn.Module, wanted: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that each linear layer's (input, output) is added to as it runs; hooks go at the
    end."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            seen.append((args[0], output))

    heads = [m for m in model.modules() if isinstance(m, nn.Linear)] if wanted else []
    handles = [module.register_forward_hook(note) for module in heads]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.clear()
