"""Checks of hyper-parameters, which name what is wrong."""

from __future__ import annotations

import sys
from typing import TypeGuard


def require_positive(**numbers: float) -> None:
    """Raises ValueError, naming the number, unless each is positive and finite."""
    for name, value in numbers.items():
        if not is_positive(value):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def require_shares(**shares: float) -> None:
    """Raises ValueError, naming the share, unless each is above 0 and at most 1."""
    for name, value in shares.items():
        if not is_number(value) or not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


def is_positive(value: object) -> bool:
    """Whether a value is a number above 0 that a float can hold."""
    # The comparison: float() of an int above the largest float raises OverflowError.
    return is_number(value) and 0 < value <= sys.float_info.max


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)
