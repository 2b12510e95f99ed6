"""Checks of hyper-parameters, which name what is wrong."""

from __future__ import annotations

import math


def require_positive(**numbers: float) -> None:
    """Raises ValueError, naming it, for one that is no positive finite number."""
    for name, value in numbers.items():
        if not is_number(value) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def require_shares(**shares: float) -> None:
    """Raises ValueError, naming it, for one that is not above 0 and at most 1."""
    for name, value in shares.items():
        if not is_number(value) or not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)
