"""Batches whose operations are not those of the first one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepclean_hooks import fisher_diagonal
from deepclean_hooks.persample.engine import SquaredGradients
from lab.reference import relative_error, squared_gradients


class Padding(nn.Module):
    """A mask for batches with padding only (T5), which is learned here."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 10)
        self.norm, self.absent = nn.LayerNorm(6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:  # (N, 5, 6)
        there = x[..., :1] > -5
        x = self.first(x.clamp(-5))
        if not there.all():
            x = torch.where(there, x, self.absent)
            x = self.first(x)
        return self.head(self.norm(x).tanh().mean(1))


class Experts(nn.Module):
    """Tokens through those experts that are asked for, two of four for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.head = nn.Linear(6, 4), nn.Linear(6, 10)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        share, chosen = self.route(flat).softmax(1).topk(2)
        out = torch.zeros_like(flat)
        for k in chosen.unique():
            token, place = (chosen == k).nonzero(as_tuple=True)
            answer = self.expert(k, flat[token]).tanh()
            out.index_add_(0, token, answer * share[token, place, None])
        return self.head(out.view_as(x).mean(1))

    def expert(self, k: Tensor, tokens: Tensor) -> Tensor:
        return self.experts[int(k)](tokens)


class Stacked(Experts):
    """The same with the experts' weights in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, 6, 6))
        del self.experts

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.route(x).softmax(2).topk(2)
        out = torch.zeros_like(x)
        for place in range(2):
            for k in range(4):
                weight = share[..., place : place + 1] * (chosen[..., place : place + 1] == k)
                if weight.detach().any():
                    out = out + F.linear(x, self.stack[k]).tanh() * weight
        return self.head(out.mean(1))


class Picked(Experts):
    """The same with each expert's weight picked from one parameter by a number of the data, as
    transformers' mixtures do."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, 6, 6))
        del self.experts

    def expert(self, k: Tensor, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.stack[k])


class Twice(nn.Module):
    """Two steps, each with the block of a parameter that its batch asks for: the same twice in a
    later batch, where the squares of both uses do not add up."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.head = nn.Parameter(torch.randn(3, 6, 6)), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = int(x[:, 0, 0].detach().max() > 5)
        return self.head(F.linear(F.linear(x, self.stack[first]).tanh(), self.stack[1]).mean(1))


def tokens(n: int = 8) -> tuple[Tensor, Tensor]:
    """Samples of five tokens; from the fifth on, the first entry of each is large, and its last
    tokens are padding."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 5, 6, generator=generator, dtype=torch.float64)
    x[4:, 0, 0] = 9
    x[5:, 3:] = -9
    return x, torch.arange(n) % 10


@pytest.mark.parametrize("batch_size", [3, 4])
@pytest.mark.parametrize("model", [Experts, Stacked, Picked])
def test_other_operations(model: type[nn.Module], batch_size: int) -> None:
    """Fails if a batch is served as the first one was, though other operations happen in it."""
    torch.manual_seed(0)
    network, (x, y) = model().double().eval(), tokens()
    measured = fisher_diagonal(network, TensorDataset(x, y), batch_size=batch_size, progress=False)
    assert relative_error(measured.sums, squared_gradients(network, x, y)) <= 1e-9
    assert not measured.settings["one_sample_loop"]


@pytest.mark.parametrize("model", [Padding, Twice])
def test_other_operations_of_a_batch(model: type[nn.Module]) -> None:
    """The same where what happens is the same for all samples of a batch."""
    torch.manual_seed(0)
    network, (x, y) = model().double().eval(), tokens()
    x, y = x[[0, 1, 2, 3, 5, 6, 7]], y[[0, 1, 2, 3, 5, 6, 7]]
    measured = fisher_diagonal(network, TensorDataset(x, y), batch_size=4, progress=False)
    assert relative_error(measured.sums, squared_gradients(network, x, y)) <= 1e-9
    assert not measured.settings["one_sample_loop"]


def test_the_loop_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if every batch with other operations goes to the one-sample loop, not only the first
    in which a parameter meets the data in a new way."""
    torch.manual_seed(0)
    network, (x, y) = Padding().double().eval(), tokens()
    x, y = x[[0, 1, 2, 3, *[5, 6, 7, 5] * 6]], y[[0, 1, 2, 3, *[5, 6, 7, 5] * 6]]
    asked: list[set[str]] = []
    original = SquaredGradients._one_by_one

    def noted(self: SquaredGradients, group: dict[str, Tensor], *args: object) -> object:
        asked.append(set(group))
        return original(self, group, *args)

    monkeypatch.setattr(SquaredGradients, "_one_by_one", noted)
    measured = fisher_diagonal(network, TensorDataset(x, y), batch_size=4, progress=False)
    assert relative_error(measured.sums, squared_gradients(network, x, y)) <= 1e-9
    assert len(asked) == 2
    assert "absent" in asked[1]


def test_zero_gradients_and_other_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the check of a parameter that was 0 so far takes what an improvised batch or the
    loop has added before for its own, or drops it."""

    class Both(Padding):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            open_ = (x[:, 0, 1] > 5).to(x)[:, None, None]
            return super().forward(x + self.gate(x.clamp(-5)).tanh() * open_)

    torch.manual_seed(0)
    x, y = tokens()
    x = x[[0, 1, 2, 3, 5, 6, 7, 5, 0, 1, 2, 3, 1, 2, 3]]
    y = torch.arange(15) % 10
    x[4:, 0, 1] = 9  # closed; then open with padding; then open without
    network = Both().double().eval()
    for improvises in (True, False):
        if not improvises:
            monkeypatch.setattr(SquaredGradients, "_improvised", lambda *_: False)
        measured = fisher_diagonal(network, TensorDataset(x, y), batch_size=4, progress=False)
        assert relative_error(measured.sums, squared_gradients(network, x, y)) <= 1e-9


def test_small_memory_and_other_operations() -> None:
    """Fails if a single sample, which is shown twice, is taken in pieces for ever, or if a
    parameter that shares an operand with a looped one is counted twice."""

    class Shared(Padding):
        def __init__(self) -> None:
            super().__init__()
            self.more, self.raw = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            far = torch.cdist(x.clamp(-5), self.raw + self.more)  # no rule
            return super().forward(x + far.mean(-1, keepdim=True) * (self.more + 1))

    torch.manual_seed(0)
    network, (x, y) = Shared().double().eval(), tokens()
    x, y = x[[0, 1, 2, 3, 5, 6, 7]], y[[0, 1, 2, 3, 5, 6, 7]]
    truth = squared_gradients(network, x, y)
    for budget in (2**28, 1):
        measured = fisher_diagonal(
            network, TensorDataset(x, y), batch_size=4, memory_budget=budget, progress=False
        )
        assert relative_error(measured.sums, truth) <= 1e-9
    assert set(measured.settings["one_sample_loop"]) == {"raw", "more"}
