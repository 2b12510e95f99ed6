"""Outputs counted into fixed bins: what a report draws, with no sample in it.

N: samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepclean_hooks.metrics.outputs import Outputs

EDGES = {
    "confidence": tuple(i / 20 for i in range(21)),
    # Half decades; what lies outside is counted in the first and the last bin.
    "loss": tuple(10 ** (i / 2) for i in range(-12, 5)),
}


def histograms(outputs: Outputs) -> dict[str, list[int]]:
    """How many samples fall in each bin of the true label's probability and of the loss (nats)."""
    return {
        "confidence": _counts(outputs.confidence, EDGES["confidence"]),
        "loss": _counts(outputs.loss, EDGES["loss"]),
    }


def _counts(values: Tensor, edges: tuple[float, ...]) -> list[int]:
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    at = torch.bucketize(values.contiguous(), inner, right=True)
    return torch.bincount(at, minlength=len(edges) - 1).tolist()
