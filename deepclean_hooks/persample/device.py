"""Where an operation runs, for the rules that choose their way by it."""

from __future__ import annotations

from torch import Tensor


def is_accelerator(tensor: Tensor) -> bool:
    """True where a product over many samples at once beats one sample in the cache after the
    other: everywhere but on a CPU."""
    return tensor.device.type != "cpu"
