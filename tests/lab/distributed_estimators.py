"""What each of the processes of test_estimators_on_ranks.py does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import deepclean_hooks as deepclean
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.expected_fisher import ExpectedFisher
from deepclean_hooks.measure.layer_inputs import LayerInputs, SampledPatches
from deepclean_hooks.measure.request import Request
from lab.distributed_worker import network, run_all, samples

METHODS: dict[str, deepclean.Method] = {
    "MSG": deepclean.MSG(),
    "ClassProjection": deepclean.ClassProjection(),
}
REFUSED: dict[str, Estimator] = {
    "BatchMean": deepclean.BatchMean(batch_size=4),
    "OutputMagnitude": deepclean.LFSSD().measured_by,
    "SampledPatches": LayerInputs(patches=SampledPatches()),
}
ESTIMATORS: dict[str, Estimator] = {
    **{name: method.retain_measured_by for name, method in METHODS.items()},
    **REFUSED,
    "SalUn": deepclean.SalUn().measured_by,
    "ExpectedFisher": ExpectedFisher(classes=5),
}


# In batches of 4: uneven on two ranks, in number and in the last batch; fewer samples than ranks.
COUNTS = (13, 1)


def measured(estimator: Estimator, count: int = 13) -> dict[str, Any]:
    """What the estimator finds in so many samples."""
    data = samples_of(samples(0, count, torch.float64), name="forget", batch_size=4)
    found = estimator(Request(network(torch.float64), data, "forget", progress=False))
    kept = {key: found.settings[key] for key in ("classes",) if key in found.settings}
    return {"sums": found.sums, "count": found.count, "ids": found.samples.tolist(), **kept}


def check(estimator: Estimator, count: int) -> Callable[[int], dict[str, Any]]:
    """The estimator as a check of every rank."""
    return lambda rank: measured(estimator, count)


CHECKS = {
    f"{name}, {count}": check(estimator, count)
    for name, estimator in ESTIMATORS.items()
    for count in COUNTS
}

if __name__ == "__main__":
    run_all(CHECKS, Path(sys.argv[1]))
