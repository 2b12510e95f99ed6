"""Several measurements at a time leave the process as it was before the first of them."""

import random
import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from deepclean_hooks import fisher_diagonal
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.measure.layer_inputs import LayerInputs
from deepclean_hooks.measure.request import Request
from deepclean_hooks.model import random_state


class Meeting(Dataset):
    """Draws random numbers; stops at its read number `at` until the second set is there too."""

    def __init__(
        self, at: int, enter: threading.Event, wait: threading.Event | None, rest: float
    ) -> None:
        self.at, self.enter, self.wait, self.rest = at, enter, wait, rest
        self.reads = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        if self.reads == self.at:
            self.enter.set()
            if self.wait is not None:
                self.wait.wait(20)
            time.sleep(self.rest)
        np.random.rand(), random.random(), torch.rand(1)
        return torch.arange(12.0) + index, index % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def measure(model: nn.Module, data: Dataset) -> object:
    return fisher_diagonal(model, data, batch_size=4, progress=False)


def grams(model: nn.Module, data: Dataset) -> object:
    return LayerInputs()(Request(model, samples_of(data, batch_size=4), progress=False))


def stance() -> object:
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


# Before the walk the first reads sample 0 and all eight twice, the second sample 0.
@pytest.mark.parametrize(("how", "at"), [(measure, 20), (grams, 5)])
def test_two_models_in_two_threads(how: object, at: int) -> None:
    """Fails if the second thread takes what the first has switched for the state to go back to: the
    first begins, the second begins, the first ends, the second ends."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(7)
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first_in, second_in = threading.Event(), threading.Event()
    sets = [Meeting(at, first_in, second_in, 0), Meeting(at, second_in, first_in, 1.0)]
    models = [network(), network()]
    torch.set_rng_state(state[0])
    threads = [threading.Thread(target=how, args=pair) for pair in zip(models, sets, strict=True)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert stance() == "default"
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()
    assert state[2] == random.getstate()


def test_one_model_in_two_threads() -> None:
    """Fails if the second thread takes the eval mode of the first for the model's own."""
    model = network().train()
    first_in, second_in = threading.Event(), threading.Event()
    sets = [Meeting(20, first_in, None, 0.5), Meeting(20, second_in, None, 0.5)]
    threads = [threading.Thread(target=measure, args=(model, data)) for data in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert first_in.is_set()
    assert second_in.is_set()
    assert all(module.training for module in model.modules())


def test_kept_inside_kept() -> None:
    """Fails if the inner block of one thread leaves its draws to the outer one."""
    with random_state.kept():
        before = torch.rand(1)
        with random_state.kept():
            inner = torch.rand(1), np.random.rand(), random.random()
        assert (torch.rand(1), np.random.rand(), random.random()) == inner
        assert before != inner[0]
