"""No entry moves but the free ones, bit for bit, whatever the optimizer."""

from deepclean_hooks.guard.guard import Guard, GuardError, NormStatistics

__all__ = ["Guard", "GuardError", "NormStatistics"]
