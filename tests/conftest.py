"""What all tests share."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from lab.hooks import hooks_of_torch

# The suite runs on two cores, and sums must not depend on how work is divided.
torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Two for the whole fast suite, where the start of a worker, some seconds, is little; none for
    named files, chosen tests and slow ones, which start processes themselves.

    `-n 0` and PYTEST_XDIST_AUTO_NUM_WORKERS say otherwise; with `--pdb` there is none.
    """
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    chosen = config.option.keyword or config.option.markexpr != "not slow"
    return min(2, os.cpu_count() or 1) if whole and not chosen else 0


def pytest_collection_finish() -> None:
    """Takes what the imports made, half a million objects, out of the collector's sight: every
    collection, and every search for averages of a model, would walk over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def optimizer_hooks_as_before() -> Iterator[None]:
    """After the test, whatever it did, torch's global hook registries are as before."""
    before = hooks_of_torch()
    yield
    assert hooks_of_torch() == before
