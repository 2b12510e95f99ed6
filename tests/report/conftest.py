"""A scored run that the tests of this room share."""

from __future__ import annotations

import copy

import pytest

import deepclean_hooks as deepclean
from lab.planted import gold, original
from lab.reported import unlearned


@pytest.fixture(scope="package")
def report() -> deepclean.Report:
    golds = [gold(seed) for seed in (10, 11, 12)]
    return unlearned(copy.deepcopy(original()), gold=golds)
