"""The processes of a run: what they send to each other, and parameters spread over them."""

from deepclean_hooks.ranks.collectives import (
    barrier_device,
    fail_together,
    gather,
    is_first,
    refuse_lossy_reduction,
    require_agreement,
    require_same,
    require_same_samples,
    share,
    share_buffers,
    sum_over_ranks,
    works_on_cpu,
    world,
)

__all__ = [
    "barrier_device",
    "fail_together",
    "gather",
    "is_first",
    "refuse_lossy_reduction",
    "require_agreement",
    "require_same",
    "require_same_samples",
    "share",
    "share_buffers",
    "sum_over_ranks",
    "works_on_cpu",
    "world",
]
