"""How far a model's certainty is from how often it is right."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_error(highest: Tensor, correct: Tensor) -> float:
    """Expected calibration error in per cent: |accuracy - mean confidence| over 15 bins of equal
    width, weighted by their samples.

    `highest` (N,): probability of the predicted class; `correct` (N,) bool. Bins are open on the
    left, as in Guo et al. (2017).
    """
    at = (highest * BINS).ceil().long().clamp(1, BINS) - 1
    off = torch.zeros(BINS, dtype=torch.float64)
    off.index_add_(0, at, correct.double() - highest)
    return 100 * float(off.abs().sum()) / len(highest)
