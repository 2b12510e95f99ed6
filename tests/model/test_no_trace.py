"""Measuring leaves no trace on the model, the random state or torch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from deepclean_hooks import evaluate, fisher_diagonal
from lab.cases import CASES
from lab.hooks import hooks_on


def trace(model: nn.Module) -> dict[str, object]:
    """Everything that measuring could leave behind."""
    return {
        "state": {n: t.detach().clone() for n, t in model.state_dict().items()},
        "pointers": [t.data_ptr() for t in model.state_dict().values()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": hooks_on(model),
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def differences(one: object, other: object) -> bool:
    """Whether two traces differ anywhere, tensors bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(differences(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) != len(other) or any(map(differences, one, other))
    return bool(one != other)


def prepared(name: str) -> tuple[nn.Module, TensorDataset]:
    """A model with mixed modes, gradients present and a frozen parameter; 5 samples."""
    model, data = CASES[name].model(), TensorDataset(*CASES[name].batch(5))
    model.train()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    for index, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.5) if index % 2 else None
    next(model.parameters()).requires_grad_(False)
    return model, data


@pytest.mark.parametrize(
    "name", ["torchvision resnet18", "timm levit", "timm vit_tiny", "tied, repeated, raw", "lstm"]
)
@pytest.mark.parametrize("measuring", [fisher_diagonal, lambda m, d: evaluate(m, test=d)])
def test_no_trace(name: str, measuring) -> None:
    """Fails if a mode, a buffer, a gradient, a hook, an attribute or a random number is left
    changed."""
    model, data = prepared(name)
    before = trace(model)
    with torch.no_grad():
        before["grad mode"] = False
        measuring(model, DataLoader(data, batch_size=3, shuffle=True))
        after = trace(model)
    assert [key for key in before if differences(before[key], after[key])] == []


def test_no_trace_after_an_exception() -> None:
    """Fails if an error in the middle of the pass leaves the model in eval mode or hooked."""
    model, data = prepared("torchvision resnet18")
    before = trace(model)
    data.tensors[1][4] = 99
    with pytest.raises(ValueError, match="label 99 is out of range"):
        fisher_diagonal(model, data, batch_size=2)
    assert [key for key, value in before.items() if differences(value, trace(model)[key])] == []


def test_the_trace_sees_a_change() -> None:
    """The opposite: a training step in between is noticed, so an unchanged trace says something."""
    model, (x, y) = (
        CASES["torchvision resnet18"].model().train(),
        CASES["torchvision resnet18"].batch(4),
    )
    before = trace(model)
    nn.functional.cross_entropy(model(x), y).backward()
    changed = {key for key, value in before.items() if differences(value, trace(model)[key])}
    assert {"state", "grad"} <= changed


def test_training_after_measuring_is_bit_identical() -> None:
    """Fails if a run with a measurement before it ends in other bits than a run without."""

    def run(measured: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = copy.deepcopy(network)
        if measured:
            fisher_diagonal(model, data, batch_size=4)
        optimizer = torch.optim.AdamW(model.parameters())
        for x, y in DataLoader(data, batch_size=4, shuffle=True):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten(), nn.Linear(96, 10)
    )
    data = TensorDataset(torch.randn(9, 3, 6, 6), torch.arange(9))
    with_measurement, without = run(True), run(False)
    assert all(torch.equal(t, without[n]) for n, t in with_measurement.items())


class Keeping(nn.Module):
    """Keeps tensors of its forward passes in several places, and drops none in `train()`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(2, 4)), nn.Linear(4, 3)
        self.derived, self.by_device, self.features = None, {}, []
        self.last: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if self.derived is None:
            self.derived = self.scale.sin().sum(0)
        if x.device not in self.by_device:
            self.by_device[x.device] = self.scale.cos().sum(0)
        x = x * self.derived + self.by_device[x.device]
        self.features.append(x)
        self.last, self.extra = (x,), x
        return self.head(x.tanh())


def test_tensors_that_a_model_keeps() -> None:
    """Fails if a derived tensor of a measurement stays in the model: its graph is used up, so the
    next backward of the user's own raises."""
    torch.manual_seed(0)
    model, x, y = Keeping().double().eval(), torch.randn(5, 4).double(), torch.arange(5) % 3
    by_device, features = model.by_device, model.features
    for measuring in (fisher_diagonal, lambda m, d: evaluate(m, test=d)):
        measuring(model, TensorDataset(x, y))
        assert model.derived is None
        assert (model.by_device, model.features, model.last) == ({}, [], ())
        assert model.by_device is by_device
        assert model.features is features
        assert not hasattr(model, "extra")
    nn.functional.cross_entropy(model(x), y).backward(retain_graph=True)
    kept = model.derived, dict(model.by_device), list(model.features)
    fisher_diagonal(model, TensorDataset(x, y))
    assert model.derived is kept[0]
    assert all(model.by_device[device] is tensor for device, tensor in kept[1].items())
    assert [id(tensor) for tensor in model.features] == [id(tensor) for tensor in kept[2]]


@pytest.mark.parametrize(
    "name",
    [
        "levit_128s",
        "tiny_vit_5m_224",
        "efficientvit_m0",
        "efficientformer_l1",
        "efficientformerv2_s0",
    ],
)
def test_attention_biases_of_timm(name: str) -> None:
    """Fails if the attention biases that these models keep in eval mode outlive a measurement."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    sizes = model.pretrained_cfg["input_size"]
    x, y = torch.randn(3, *sizes), torch.arange(3)
    evaluate(model, test=TensorDataset(x, y))
    caches = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
    assert not any(caches)
    nn.functional.cross_entropy(model(x), y).backward()
