"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch

from lab.guarding import hooks_of_torch

# The suite runs on two cores, and sums must not depend on how work is divided.
torch.set_num_threads(1)


@pytest.fixture
def optimizer_hooks_as_before() -> Iterator[None]:
    """After the test, whatever it did, torch's global hook registries are as before."""
    before = hooks_of_torch()
    yield
    assert hooks_of_torch() == before
