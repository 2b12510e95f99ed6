"""Squared per-sample gradients of any classifier, exactly, in one forward and one backward."""
