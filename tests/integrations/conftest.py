"""What the tests of the adapters share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from lab.hooks import hooks_of_torch


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate's shared state is new for each test, and no hook of torch's is left."""
    before = hooks_of_torch()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert hooks_of_torch() == before
