"""Operations of everyday models beside those of the case table: no loop, and the right number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from deepclean_hooks import fisher_diagonal
from lab.reference import relative_error, squared_gradients


class Between(nn.Module):
    """An operation with parameters of its own between two linear layers."""

    def __init__(self, operation: Callable[["Between", Tensor], Tensor]) -> None:
        super().__init__()
        self.operation, self.first, self.head = operation, nn.Linear(6, 6), nn.Linear(6, 10)
        self.scale, self.floor = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(-torch.rand(6) - 1)
        self.table = nn.Parameter(torch.randn(4, 6))
        self.cube, self.number = nn.Parameter(torch.randn(4, 2, 3)), nn.Parameter(torch.tensor(0.3))
        self.pairs = nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:  # (N, 5, 6)
        return self.head(self.operation(self, self.first(x)).tanh().mean(1))


def chosen(x: Tensor) -> Tensor:
    """A whole number from 0 to 3 for each token."""
    return (x.detach().sum(-1) * 3).long().clamp(-2, 1)


def root_mean_square(m: Between, x: Tensor) -> Tensor:
    """Gemma's normalisation."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.scale)


OPERATIONS: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "multiply": lambda m, x: torch.multiply(x, m.scale),
    "subtract, divide": lambda m, x: torch.divide(torch.subtract(m.floor, x), m.scale),
    "multiply in place": lambda m, x: x.clone().multiply_(m.scale),
    "clamp": lambda m, x: torch.clamp(x, min=m.floor, max=m.scale),
    "clamp_min": lambda m, x: x.clamp_min(m.floor),
    "masked_fill": lambda m, x: x.masked_fill(x.detach() > 0.2, m.number),
    "masked_fill of some samples": lambda m, x: torch.masked_fill(
        x, (x.detach() > 0).all(2, keepdim=True), m.number
    ),
    "index": lambda m, x: x + m.table[chosen(x)],
    "index of blocks": lambda m, x: x + m.cube[chosen(x)].flatten(-2),
    "index_select": lambda m, x: x + m.table.index_select(0, chosen(x).flatten() + 2).view_as(x),
    "bilinear": lambda m, x: m.pairs(x, x.sin()),
    "bilinear, unbiased": lambda m, x: F.bilinear(x, x.cos(), m.pairs.weight),
    "root mean square": root_mean_square,
    "checkpoint": lambda m, x: checkpoint(lambda t: t * m.scale, x, use_reentrant=False),
}


def tokens(n: int = 7) -> tuple[Tensor, Tensor]:
    """Samples of five tokens."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 5, 6, generator=generator, dtype=torch.float64), torch.arange(n)


def require_exact(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 4) -> None:
    """Compares with one sample at a time, on batches of 4 and 3."""
    measured = fisher_diagonal(model, TensorDataset(x, y), batch_size=batch_size, progress=False)
    assert relative_error(measured.sums, squared_gradients(model, x, y)) <= 1e-9
    assert not measured.settings["one_sample_loop"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str) -> None:
    """Fails if an operation is squared wrongly, or one sample at a time."""
    torch.manual_seed(0)
    require_exact(Between(OPERATIONS[name]).double().eval(), *tokens())


class Recurrent(nn.Module):
    """A recurrent layer, read at all its steps and at its last state."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.layer = kind(6, 4, **options)
        self.time = 1 if options.get("batch_first") else 0
        width = 4 * (2 if options.get("bidirectional") else 1)
        self.head, self.last = nn.Linear(width, 10), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        out, state = self.layer(x if self.time else x.transpose(0, 1))
        state = sum(state) if isinstance(state, tuple) else state
        return self.head(out.sin().sum(self.time)) + self.last(state[-1])


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
        {"bias": False, "batch_first": True, "bidirectional": True},
    ],
)
@pytest.mark.parametrize(
    "kind", [nn.LSTM, nn.GRU, nn.RNN, lambda *a, **o: nn.RNN(*a, nonlinearity="relu", **o)]
)
def test_recurrent_layers(kind: Any, options: dict[str, Any]) -> None:
    """Fails if a step, a direction, a layer or a bias of a recurrent layer is left out, or if its
    sequences go one at a time."""
    torch.manual_seed(0)
    require_exact(Recurrent(kind, **options).double().eval(), *tokens())


def test_rows_of_a_large_table() -> None:
    """Fails if a row that a sample reads several times is squared read by read, or if the gradient
    of the whole table is held for each sample (here 800 MB)."""
    torch.manual_seed(0)
    table = nn.EmbeddingBag(500_000, 50, mode="mean").weight
    model = nn.Sequential(nn.Embedding(500_000, 50), nn.Flatten(), nn.Linear(200, 10)).eval()
    model[0].weight.data = table.data
    x, y = torch.randint(0, 500_000, (8, 4)), torch.arange(8)
    x[:, 2] = x[:, 0]
    measured = fisher_diagonal(model, TensorDataset(x, y), batch_size=8, progress=False)
    assert not measured.settings["one_sample_loop"]
    reads = torch.autograd.functional.jacobian(
        lambda e: F.cross_entropy(model[2](e.flatten(1)), y, reduction="none").sum(),
        model[0](x).detach(),
    )
    twice = reads[:, 0] + reads[:, 2]
    expected = torch.zeros(500_000, 50, dtype=torch.float64)
    for rows, grads in ((x[:, 0], twice), (x[:, 1], reads[:, 1]), (x[:, 3], reads[:, 3])):
        expected.index_add_(0, rows, grads.double().square())
    error = (measured.sums["0.weight"] - expected).abs().max() / expected.max()
    assert error <= 1e-5


class Packed(nn.Module):
    """A GRU over packed sequences, and an LSTM with projections: neither is unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRU(6, 4, batch_first=True), nn.LSTM(4, 4, proj_size=2)
        self.head = nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, :, 0] > -9).sum(1) - (x[:, 0, 1] > 0).long() * 2
        pack = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        state = self.gru(pack)[1]
        return self.head(self.lstm(state)[0][0])


def test_packed_sequences() -> None:
    """Fails if packed rows are given to samples as padded ones lie."""
    torch.manual_seed(0)
    model, (x, y) = Packed().double().eval(), tokens()
    measured = fisher_diagonal(model, TensorDataset(x, y), batch_size=4, progress=False)
    assert relative_error(measured.sums, squared_gradients(model, x, y)) <= 1e-9


def test_norms_in_less_than_the_parameters_precision() -> None:
    """Fails if a layer that computes in float32 inside a float64 model goes to the loop for its
    rounding."""

    def norm(m: Between, x: Tensor) -> Tensor:
        return root_mean_square(m, x.float()).double() * m.scale.float()

    torch.manual_seed(0)
    model, (x, y) = Between(norm).double().eval(), tokens()
    measured = fisher_diagonal(model, TensorDataset(x, y), batch_size=4, progress=False)
    assert relative_error(measured.sums, squared_gradients(model, x, y)) <= 1e-6
    assert not measured.settings["one_sample_loop"]
