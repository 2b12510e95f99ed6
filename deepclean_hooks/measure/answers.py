"""What a model answers to the samples of a set: its probabilities, and the loss of each.

N: samples of the set, C: classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.data.walk import walk, walk_together
from deepclean_hooks.model import no_trace
from deepclean_hooks.ranks import fsdp


@dataclass(frozen=True)
class Answers:
    """In the order of the set's samples, the same on every rank, on the CPU.

    `probabilities` (N, C) in the type that the model computes in; `labels` (N,) int64; `losses`
    (N,) float64, the cross-entropy; `fingerprints` (N,) int64, as in a measurement.
    """

    probabilities: Tensor
    labels: Tensor
    losses: Tensor
    fingerprints: Tensor


def answers(model: nn.Module, source: Samples, name: str, *, progress: bool = False) -> Answers:
    """The model's answers in eval mode, each sample once over all ranks; leaves it as it was.

    Raises TypeError for batches or outputs of unknown form, ValueError for bad labels.
    """
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    ids: list[int] = []
    with no_trace.no_trace(model) as inner, no_trace.float32_weights(inner) as dtype:
        how: dict[str, Any] = {"device": no_trace.device_of(inner), "dtype": dtype, "ids": ids}
        how["progress"] = f"answers: {name}" if progress else None
        if fsdp.is_sharded(inner):
            for batch, counted in walk_together(source, **how):
                rows.append(_of_batch(inner, batch, counted))
        else:
            with ranks.fail_together():
                for batch in walk(source, name=name, **how):
                    rows.append(_of_batch(inner, batch, batches.size(batch)))
    mine = tuple(torch.cat(column) for column in zip(*rows, strict=True)) if rows else ()
    columns = zip(*(part for part in ranks.gather(mine) if part), strict=True)
    probabilities, labels, loss = (_in_order(list(column)) for column in columns)
    fingerprints = _in_order([torch.tensor(part, dtype=torch.int64) for part in ranks.gather(ids)])
    return Answers(probabilities, labels, loss, fingerprints)


def _of_batch(model: nn.Module, batch: Any, counted: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        logits, labels = losses.logits_and_labels(model, batch)
    # On the CPU because not every accelerator has float64.
    logits, labels = logits[:counted].cpu(), labels[:counted].cpu()
    exact = logits.double()
    loss = F.cross_entropy(exact, labels, reduction="none")
    return exact.softmax(1).to(logits.dtype), labels, losses.per_sample(loss, counted)


def _in_order(parts: list[Tensor]) -> Tensor:
    # Rank r walked the samples r, r + world, ...
    whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype)
    world = ranks.world()[1]
    for rank, part in enumerate(parts):
        whole[rank::world] = part
    return whole
