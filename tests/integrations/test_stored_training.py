"""`unlearn(..., checkpoint=)`: a run that was killed goes on to the same bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

import deepclean_hooks as deepclean
from deepclean_hooks.integrations import stored_training
from deepclean_hooks.stored.sealed import BrokenRun
from lab.planted import FORGET, RETAIN, original

KEPT = Subset(RETAIN, range(40))  # 5 steps an epoch
METHODS = {
    "deepclean": deepclean.DeepClean(gamma=1.1),
    "a term that draws": deepclean.RandomLabel(seed=3),
}


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


class Dropping(nn.Module):
    """The planted network with dropout, which draws from the global random state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = copy.deepcopy(original())

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.net(x), 0.3, self.training)


def run(path: Path | None, method: deepclean.Method, kill_at: int = 0) -> dict[str, Tensor]:
    """The weights after two epochs; killed before the step `kill_at` of this process."""
    model, steps = Dropping(), 0
    torch.manual_seed(5)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal steps
        steps += model.training
        if model.training and steps == kill_at:
            raise Killed
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    deepclean.unlearn(
        model, FORGET, KEPT, method=method, epochs=2, checkpoint=path, loss_fn=loss,
        scores=False, dead_count=False, batch_size=8, progress=False,
    )  # fmt: skip
    return model.state_dict()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kills", [(1, 6), (3, 3, 3)])
@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(0.0, id="each step", marks=pytest.mark.slow),
        pytest.param(60.0, id="each epoch"),
    ],
)
def test_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: deepclean.Method,
    kills: tuple[int, ...],
    seconds: float,
) -> None:
    """Fails if the optimizer, the schedule, the order, dropout or the term's draw starts anew."""
    monkeypatch.setattr(stored_training, "SECONDS", seconds)
    whole = run(None, method)
    path = tmp_path / "run"
    for at in kills:
        with pytest.raises(Killed):
            run(path, method, at)
    ended = run(path, method)
    assert all(torch.equal(ended[name], value) for name, value in whole.items())
    again = run(path, method)  # a run that has ended has nothing left to train
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    """Fails if an altered optimizer state, or another model's run, is taken up."""
    path = tmp_path / "run"
    run(path, METHODS["deepclean"])
    held = torch.load(path, weights_only=True)
    held["training"][-100] ^= 1
    torch.save(held, path)
    with pytest.raises(BrokenRun, match=r"training in .* was altered; remove"):
        run(path, METHODS["deepclean"])
    held["weights"].popitem()
    torch.save(held, path)
    with pytest.raises(BrokenRun, match="holds no run of this model"):
        run(path, METHODS["deepclean"])


def test_checkpoint_resumes_by_itself(tmp_path: Path) -> None:
    """Fails if two states to go on from are given, and one wins in silence."""
    with pytest.raises(ValueError, match="leave resume= and stop= out"):
        deepclean.unlearn(
            original(), FORGET, RETAIN, method=METHODS["deepclean"], resume={},
            checkpoint=tmp_path / "run",
        )  # fmt: skip
