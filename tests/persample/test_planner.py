"""Plans: what is found out on three samples, what is not, and what is remembered of it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepclean_hooks import fisher_diagonal
from deepclean_hooks.persample import forwards, intercept
from deepclean_hooks.persample.engine import SquaredGradients
from lab.cases import CASES
from lab.reference import relative_error, squared_gradients

STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda h: h.relu_(),
    "nn.ReLU(inplace=True)": nn.ReLU(inplace=True),
    "*=": lambda h: h.mul_(1.5),
    "+= a constant": lambda h: h.__iadd__(1),
    "clamp_": lambda h: h.clamp_(-1, 1),
    "setitem": lambda h: (h.__setitem__((slice(None), 0), 0.5), h)[1],
    "of a view": lambda h: (h.view(-1, h.shape[-1]).sigmoid_(), h)[1],
    "of a slice": lambda h: (h[..., :3].tanh_(), h)[1],
    "masked_fill_": lambda h: h.masked_fill_(h.detach() > 1, 0.0),
}


class Stepping(nn.Module):
    """A step in place behind layers whose outputs are views, the first layer's among them."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step, self.table = step, nn.Embedding(4, 6)
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:  # (N, 5, 6)
        h = self.step(self.a(x))
        h = h + self.step(self.table(x[..., 0].abs().long().clamp(max=3)))
        return self.head(self.step(self.b(h)).mean(1))


def tokens(n: int = 7) -> tuple[Tensor, Tensor]:
    """Samples of five tokens."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 5, 6, generator=generator, dtype=torch.float64), torch.arange(n) % 10


@pytest.mark.parametrize("name", STEPS)
def test_steps_in_place(name: str) -> None:
    """Fails if a step in place takes the hook from the output before it, which is a view of
    something else: the squares were 0, or the layer went to the loop."""
    torch.manual_seed(0)
    model, (x, y) = Stepping(STEPS[name]).double().eval(), tokens()
    measured = fisher_diagonal(model, TensorDataset(x, y), batch_size=4, progress=False)
    assert relative_error(measured.sums, squared_gradients(model, x, y)) <= 1e-9
    assert not measured.settings["one_sample_loop"]


class Gated(nn.Module):
    """Adapters of two domains; only those of a sample's own domain get a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.raw, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        domain = (x[:, 0, 0] > 5).to(x)[:, None, None]
        out = x.tanh() + self.adapters[0](x).tanh() * (1 - domain)
        return self.head((out + (self.adapters[1](x) * self.raw).tanh() * domain).mean(1))


def test_gradient_that_was_zero_is_checked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a wrong square passes because the three samples of the self-check had no gradient
    there: 0 is 0 whatever the rule says. Here the hook of one use is dropped in all but the
    self-check, and the rule of the other is 5 % off."""
    torch.manual_seed(0)
    model, (x, y) = Gated().double().eval(), tokens(8)
    x[:4, 0, 0], x[4:, 0, 0] = 0, 9  # sorted by domain
    truth = squared_gradients(model, x, y)
    right = forwards.ServedPass._use

    def wrong(self: forwards.ServedPass, rule: object) -> object:
        receive = right(self, rule)
        if any(w is model.adapters[1].weight for w in rule.operands.values()):
            return lambda grad: receive(grad * 1.05)
        return receive

    monkeypatch.setattr(forwards.ServedPass, "_use", wrong)
    measured = fisher_diagonal(model, TensorDataset(x, y), batch_size=4, progress=False)
    assert relative_error(measured.sums, truth) <= 1e-9
    assert set(measured.settings["one_sample_loop"]) == {"adapters.1.weight", "adapters.1.bias"}


class Pixels(nn.Module):
    """Whole numbers that become floats in the model, in one of several ways."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 10)
        self.table = nn.Embedding(9, 6)
        self.table.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.how(self, x)).tanh().flatten(1, -2).mean(1))


CODES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], torch.dtype]] = {
    "pixels / 255": (lambda m, x: x.double() / 255 - 0.5, torch.uint8),
    "divided as they are": (lambda m, x: x.double().div(8).sub(0.5), torch.int32),
    "frozen table": (lambda m, x: m.table(x.long().clamp(max=8)), torch.int64),
    "frozen table by index": (lambda m, x: m.table.weight[x.long()], torch.int64),
    "one-hot": (lambda m, x: F.one_hot(x.long(), 6).double(), torch.int64),
    "turned": (lambda m, x: (x.permute(2, 0, 1).double() - 4).permute(1, 2, 0), torch.int16),
    "a mask": (lambda m, x: (x > 3).double() - 0.5, torch.uint8),
    "bits": (lambda m, x: ((x[..., None] >> torch.arange(6)) & 1).double() - 0.5, torch.uint8),
}


@pytest.mark.parametrize("name", CODES)
def test_whole_numbers_that_become_floats(name: str) -> None:
    """Fails if a model whose input cannot be NaN is measured one sample at a time, or wrongly."""
    torch.manual_seed(0)
    how, dtype = CODES[name]
    model = Pixels(how).double().eval()
    x, y = torch.randint(0, 6, (7, 4, 6)).to(dtype), torch.arange(7)
    measured = fisher_diagonal(model, TensorDataset(x, y), batch_size=4, progress=False)
    assert relative_error(measured.sums, squared_gradients(model, x, y)) <= 1e-9
    assert not measured.settings["one_sample_loop"]


@pytest.mark.parametrize("name", ["pixels", "timm vit_tiny", "embedding, sequence first"])
def test_one_backward_where_the_probe_sees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if samples are told apart in two backward passes, though the probe can see where they
    lie: pixels in whole numbers, a class token that is copied for each sample."""
    torch.manual_seed(0)
    if name == "pixels":
        model = Pixels(CODES["pixels / 255"][0]).double().eval()
        x, y = torch.randint(0, 6, (7, 4, 6)).to(torch.uint8), torch.arange(7)
    else:
        model, (x, y) = CASES[name].model().eval(), CASES[name].batch(7)
    weighed: list[bool] = []
    original = SquaredGradients._weighed

    def noted(self: SquaredGradients, *args: object) -> bool:
        weighed.append(original(self, *args))
        return weighed[-1]

    monkeypatch.setattr(SquaredGradients, "_weighed", noted)
    fisher_diagonal(model, TensorDataset(x, y), batch_size=4, progress=False)
    assert weighed
    assert not any(weighed)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("once"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        torch.OutOfMemoryError("CUDA out of memory."),
        ConnectionResetError("once"),
    ],
)
@pytest.mark.parametrize("at", [2, 4, 6])
def test_errors_of_the_machine_come_out(error: Exception, at: int) -> None:
    """Fails if a passing lack of memory sends a model to the one-sample loop, for its life."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.calls = nn.Linear(6, 10), [0]

        def forward(self, x: Tensor) -> Tensor:
            self.calls[0] += 1
            if self.calls[0] == at:
                raise error
            return self.head(x)

    model = Failing()
    data = TensorDataset(torch.randn(4, 6), torch.arange(4))
    with pytest.raises(type(error), match=str(error)[:4]):
        fisher_diagonal(model, data, progress=False)
    measured = fisher_diagonal(model, data, progress=False)
    assert not measured.settings["one_sample_loop"]


def test_data_written_into_parameters() -> None:
    """Fails if the data loses its history where it is written into a tensor made of parameters."""

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.up = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)
            self.head = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            out = x.new_zeros(len(x), 6, 6)
            out[:, 0] = self.token
            out[:, 1:] = self.up(x)
            return self.head(out.tanh().mean(1))

    torch.manual_seed(0)
    model, (x, y) = Writing().double().eval(), tokens()
    measured = fisher_diagonal(model, TensorDataset(x, y), batch_size=4, progress=False)
    assert relative_error(measured.sums, squared_gradients(model, x, y)) <= 1e-9


def test_what_looks_at_the_data_is_known() -> None:
    """Fails if a way to index by data, in this version of torch, is not looked at."""
    assert {Tensor.__getitem__, torch.gather, Tensor.index_add_} <= intercept._LOOKED_AT
