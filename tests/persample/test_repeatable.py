"""Models that are no function of their input in eval mode are refused before any measurement."""

import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepclean_hooks import fisher_diagonal


class Disturbed(nn.Module):
    """A linear classifier, its input disturbed by the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.calls = nn.Linear(6, 6), nn.Linear(6, 10), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.disturb(self.first(x)).tanh())

    def disturb(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class AlwaysDropping(Disturbed):
    def disturb(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)  # training=True is the default


class RarelyDropping(Disturbed):
    """Stochastic depth of a whole batch, one time in five."""

    def disturb(self, x: Tensor) -> Tensor:
        return x * torch.rand(()).gt(0.2)


class Noisy(Disturbed):
    def disturb(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class PythonsDepth(Disturbed):
    def disturb(self, x: Tensor) -> Tensor:
        return x * (random.random() > 0.2)


class NumPysNoise(Disturbed):
    def disturb(self, x: Tensor) -> Tensor:
        return x + numpy.random.randn()


class Counting(Disturbed):
    def disturb(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x / self.calls


class Remembering(Disturbed):
    """A running mean that moves in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def disturb(self, x: Tensor) -> Tensor:
        self.mean += 0.1 * (x.detach().mean(0) - self.mean)
        return x - self.mean


def data() -> TensorDataset:
    """Five samples."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(5, 6, generator=generator), torch.arange(5))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (AlwaysDropping, "dropout in AlwaysDropping"),
        (RarelyDropping, "rand in RarelyDropping draw"),
        (Noisy, "randn_like in Noisy draw"),
        (PythonsDepth, "random numbers of Python's"),
        (NumPysNoise, "random numbers of Python's"),
        (Counting, "a count of its calls"),
        (Remembering, "something else than its input"),
    ],
)
def test_what_does_not_repeat_is_refused(model: type[nn.Module], why: str) -> None:
    """Fails if the Fisher diagonal of one draw among many is taken for the model's."""
    torch.manual_seed(0)
    network = model()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=f"the same batch twice gives two losses .*({why})"):
        fisher_diagonal(network, data(), progress=False)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


class DrawsInVain(Disturbed):
    def disturb(self, x: Tensor) -> Tensor:
        return x if torch.rand(()) < 2 else -x


class PlaceInBatch(Disturbed):
    def disturb(self, x: Tensor) -> Tensor:
        return x * torch.arange(1, len(x) + 1)[:, None]


def test_draws_without_effect_are_no_reason() -> None:
    """Fails if a model is refused for a random number that changes nothing."""
    assert fisher_diagonal(DrawsInVain(), data(), progress=False).count == 5


def test_the_place_in_the_batch_counts() -> None:
    """Fails if a model whose output depends on a sample's place in its batch is measured."""
    with pytest.raises(ValueError, match="mixes the samples"):
        fisher_diagonal(PlaceInBatch(), data(), progress=False)


class Bag(nn.Module):
    """A table whose rows are scaled down where they are read."""

    def __init__(self, scale: float, bag: bool) -> None:
        super().__init__()
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.table, self.head = kind(9, 6, max_norm=1.0), nn.Linear(6, 10)
        with torch.no_grad():
            self.table.weight.div_(self.table.weight.norm(dim=1, keepdim=True) * scale)

    def forward(self, x: Tensor) -> Tensor:
        read = self.table(x)
        return self.head(read if read.dim() == 2 else read.mean(1))


class Clamped(Disturbed):
    def disturb(self, x: Tensor) -> Tensor:
        self.first.weight.data.clamp_(-0.01, 0.01)
        return x


class Assigned(Disturbed):
    def disturb(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.bias[0] = 1.0
        return x


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: Bag(0.5, False), "reading table.weight changes it: 9 of its 9 rows"),
        (lambda: Bag(0.5, True), "reading table.weight changes it: 9 of its 9 rows"),
        (Clamped, r"writes to first.weight \(clamp_\)"),
        (Assigned, r"writes to head.bias \(__setitem__\)"),
    ],
)
def test_forwards_that_write_parameters_are_refused(model: object, why: str) -> None:
    """Fails if measuring changes the weights, or if the error comes after the change."""
    torch.manual_seed(0)
    network = model()
    if isinstance(network, Bag):
        batch = TensorDataset(torch.randint(0, 9, (5, 4)), torch.arange(5))
    else:
        batch = data()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        fisher_diagonal(network, batch, progress=False)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


def test_writes_that_change_nothing_are_no_reason() -> None:
    """Fails if a table whose rows are short enough is refused."""
    network = Bag(2.0, False)
    before = network.table.weight.detach().clone()
    batch = TensorDataset(torch.randint(0, 9, (5, 4)), torch.arange(5))
    fisher_diagonal(network, batch, progress=False)
    assert torch.equal(network.table.weight, before)
