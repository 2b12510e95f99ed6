"""The traps around per-sample gradients: batches of one, mixing models, wrong rules, memory,
wrappers."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepclean_hooks import fisher_diagonal
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.measure.batch_mean import MeanGradient, OutputMagnitude
from deepclean_hooks.measure.request import Request
from deepclean_hooks.model import no_trace
from deepclean_hooks.persample import accumulate, device, outer
from deepclean_hooks.persample.engine import SquaredGradients
from deepclean_hooks.persample.rules.linear import Linear
from deepclean_hooks.persample.windows import SMALL_MAP
from lab.cases import CASES, Tied
from lab.reference import relative_error, squared_gradients


def double(name: str, n: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of the table and n samples, in float64."""
    model, (x, y) = CASES[name].model().double(), CASES[name].batch(n)
    return model, x.double(), y


@pytest.mark.parametrize("name", ["timm levit", "timm xcit", "convolutions"])
def test_last_batch_of_one(name: str) -> None:
    """Fails if a batch of one reaches PyTorch's BatchNorm backward, which is off by 100 % there
    (LeViT, XCiT)."""
    model, x, y = double(name)
    truth = squared_gradients(model, x, y)
    found = fisher_diagonal(model, TensorDataset(x, y), batch_size=4)
    assert relative_error(found.sums, truth) <= 1e-9
    alone = fisher_diagonal(model, TensorDataset(x, y), batch_size=1)
    assert relative_error(alone.sums, truth) <= 1e-9


@pytest.mark.parametrize("name", ["timm levit", "timm xcit"])
def test_batch_gradients_of_one_sample(name: str) -> None:
    """Fails if the estimators of whole batches show PyTorch a batch of one: a mean over samples,
    and a sum."""
    model, x, y = double(name, 1)
    model.eval()
    weights = dict(model.named_parameters())
    for estimator in (MeanGradient(), OutputMagnitude(batch_size=1)):
        found = estimator(Request(model, samples_of(TensorDataset(x, y))))
        twice = model(x.repeat(2, 1, 1, 1))
        value = F.cross_entropy(twice, y.repeat(2))
        if isinstance(estimator, OutputMagnitude):
            value = twice.square().sum(1).mean()
        truth = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
        for (name, _), gradient in zip(weights.items(), truth, strict=True):
            expected = estimator.term(gradient)
            off = (found.sums[name] - expected).abs().max()
            assert off <= 1e-9 * expected.abs().max().clamp_min(1e-9), name


def test_native_batch_norm_is_wrong_for_a_batch_of_one() -> None:
    """Shows the trap: if PyTorch mends it this fails, and the padding may go."""
    norm = nn.BatchNorm2d(16).double().eval()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1, 16, 16, dtype=torch.float64).transpose(1, 2)  # channels-last strides
    (found,) = torch.autograd.grad(norm(x).flatten(2), x, grad)
    scale = (norm.running_var + norm.eps).rsqrt().view(1, -1, 1, 1)
    assert not torch.allclose(found, grad.reshape(x.shape) * scale)


def test_small_memory_budget_changes_nothing() -> None:
    """Fails if a batch taken in pieces counts a sample twice or not at all."""
    model, x, y = double("tied, repeated, raw", 7)
    data = TensorDataset(x, y)
    whole = fisher_diagonal(model, data, batch_size=7)
    pieces = fisher_diagonal(model, data, batch_size=7, memory_budget=1)
    assert relative_error(pieces.sums, whole.sums) <= 1e-12
    assert pieces.count == 7


def test_memory_budget_bounds_per_sample_gradients() -> None:
    """Fails if the engine holds the per-sample gradients of a whole batch at once although the
    budget says two."""
    model = Tied().double().eval()
    parameters = dict(model.named_parameters())
    sizes: list[int] = []
    with no_trace.no_trace(model):
        engine = SquaredGradients(model, parameters, memory_budget=2**20)
        x, y = torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.arange(8)
        engine.memory_budget = 2 * engine.plan_for((x, y)).bytes_per_sample
        original = engine._add
        engine._add = lambda piece, *rest: (sizes.append(len(piece[1])), original(piece, *rest))
        engine.add((x, y))
        # Not timing-dependent: the cycle between the wrapper and the engine ends here.
        engine._add = original
    gc.collect()
    assert sizes == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"),
    [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        ((3, 5), (3, 2), (2, 1), (1, 2)),
        ((1, 3), 1, 1, (0, 1)),
        (5, 2, 2, 4),
        (2, 3, 1, 0),
        (4, 2, 1, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("accelerated", [False, True])
def test_windows_of_every_geometry(
    kernel: object,
    stride: object,
    dilation: object,
    padding: object,
    dtype: torch.dtype,
    accelerated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if the windows of a convolution are cut in the wrong place, with rows left over or
    rows missing, or if a second batch is added otherwise than the first lies in memory, which is
    that of a large parameter in float32. (A wrong rule would be caught by the self-check and go to
    the loop.)"""
    monkeypatch.setattr(accumulate, "SCRATCH_FROM", 1)
    monkeypatch.setattr(device, "is_accelerator", lambda _: accelerated)
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, kernel, stride, padding, dilation)
    model = nn.Sequential(convolution, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.to(dtype).eval()
    x, y = torch.randn(7, 3, 19, 17, dtype=dtype), torch.arange(7) % 5
    assert model[0](x)[0, 0].numel() > SMALL_MAP
    found = fisher_diagonal(model, TensorDataset(x, y), batch_size=4)
    assert not found.settings["one_sample_loop"]
    truth = squared_gradients(copy.deepcopy(model).double(), x.double(), y)
    assert relative_error(found.sums, truth) <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("budget", [1, 2**15])
@pytest.mark.parametrize(
    "name",
    [
        "convolutions",
        "torchvision resnet18",
        "timm vit_tiny",
        pytest.param("timm convnext_atto", marks=pytest.mark.slow),
        pytest.param("timm levit", marks=pytest.mark.slow),
    ],
)
def test_ways_of_an_accelerator(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what the rules do on a GPU, here done on the CPU, gives another number, or leaves
    out samples between the pieces that the budget allows."""
    model, x, y = double(name)
    truth = squared_gradients(model, x, y)
    served = []
    monkeypatch.setattr(device, "is_accelerator", lambda tensor: served.append(tensor) or True)
    monkeypatch.setattr(outer, "BATCHED_BYTES", budget)
    found = fisher_diagonal(model, TensorDataset(x, y), batch_size=4)
    assert served
    assert relative_error(found.sums, truth) <= 1e-9
    assert not found.settings["one_sample_loop"]


def test_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the self-check does not compare every parameter: here linear weights come out 5 %
    too large."""
    model, x, y = double("torchvision vit (nn.MultiheadAttention)")
    truth = squared_gradients(model, x, y)
    right = Linear.per_sample

    def wrong(self: Linear, grad: Tensor, names: object) -> object:
        each = right(self, grad, names)
        return {k: g * 1.05 if k == "weight" else g for k, g in each.items()}

    monkeypatch.setattr(Linear, "per_sample", wrong)
    monkeypatch.setattr(
        Linear,
        "squares",
        lambda self, g, names, into: {
            k: e.square().sum(0) for k, e in self.per_sample(g, names).items()
        },
    )
    found = fisher_diagonal(model, TensorDataset(x, y), batch_size=5)
    assert relative_error(found.sums, truth) <= 1e-9
    looped = found.settings["one_sample_loop"]
    assert "heads.head.weight" in looped
    assert all("self-check" in reason for reason in looped.values())


class Branching(nn.Module):
    """Runs another layer when the batch's mean is positive: its operations depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.detach().abs().max() > 10:
            x = self.other(self.one(x))
        return self.head(self.one(x).tanh())


def test_operations_that_depend_on_the_data() -> None:
    """Fails if a batch whose operations differ from the probe's is served by the probe's plan."""
    torch.manual_seed(0)
    model = Branching().double()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8)
    x[4:] += 20
    truth = squared_gradients(model, x[:4], y[:4])
    for name, total in squared_gradients(model, x[4:], y[4:]).items():
        truth[name] += total
    found = fisher_diagonal(model, TensorDataset(x, y), batch_size=4)
    assert relative_error(found.sums, truth) <= 1e-9
    assert not found.settings["one_sample_loop"]  # told apart in the backward of that batch


@pytest.mark.parametrize("affine", [True, False])
def test_model_that_mixes_samples_is_refused(affine: bool) -> None:
    """Fails if batch statistics in eval mode pass unnoticed: then no sample has a gradient of its
    own."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False, affine=affine),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    data = TensorDataset(torch.randn(4, 3, 6, 6), torch.arange(4))
    with pytest.raises(ValueError, match=r"mixes the samples of a batch .*\['1'\]"):
        fisher_diagonal(model, data)


def test_activation_overwritten_after_use_goes_to_the_loop_or_raises() -> None:
    """Fails if a saved input that was overwritten is used: the squares would be of other data."""

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = x * self.scale
            out = self.head(h)
            h.detach().zero_()  # autograd refuses this in a plain backward too
            return out

    model = Overwriting().double()
    data = TensorDataset(torch.randn(4, 6, dtype=torch.float64), torch.arange(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fisher_diagonal(model, data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    """Fails if half-precision weights are measured in half precision: their median error is 3.6
    %."""
    model, (x, y) = CASES["timm vit_tiny"].model().to(dtype), CASES["timm vit_tiny"].batch(5)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    found = fisher_diagonal(model, TensorDataset(x.to(dtype), y))
    exact = copy.deepcopy(model).float()
    wanted = fisher_diagonal(exact, TensorDataset(x.to(dtype).float(), y))
    assert all((found.sums[n] == wanted.sums[n]).all() for n in wanted.sums)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    assert all(p.dtype == dtype for p in model.parameters())


def test_compiled_model() -> None:
    """Fails if the interception does not see into a compiled model."""
    model, x, y = double("torchvision vit (nn.MultiheadAttention)")
    truth = squared_gradients(model, x, y)
    data = TensorDataset(x, y)
    compiled = torch.compile(model, backend="aot_eager")
    assert relative_error(fisher_diagonal(compiled, data).sums, truth) <= 1e-9
    model.compile(backend="aot_eager")
    assert relative_error(fisher_diagonal(model, data).sums, truth) <= 1e-9


def test_activation_checkpointing() -> None:
    """Fails if a recomputed forward escapes the interception, or if checkpointing stays switched
    off."""
    model, x, y = double("timm vit_tiny")
    truth = squared_gradients(model, x, y)
    model.set_grad_checkpointing(True)
    found = fisher_diagonal(model, TensorDataset(x, y))
    assert relative_error(found.sums, truth) <= 1e-9
    assert not found.settings["one_sample_loop"]
    assert model.grad_checkpointing is True


def test_stale_cache_of_derived_weights() -> None:
    """Fails if biases that LeViT cached in an earlier eval pass hide their parameters (gradient
    0)."""
    model, x, y = double("timm levit", 3)
    truth = squared_gradients(model, x, y)
    with torch.no_grad():
        model(x)  # fills the caches
    found = fisher_diagonal(model, TensorDataset(x, y))
    assert relative_error(found.sums, truth) <= 1e-9
    caches = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
    assert caches
    assert not any(caches)


def test_data_parallel_wrapper() -> None:
    """Fails if names carry a wrapper's prefix."""
    model, x, y = double("unused, frozen, in place")
    names = fisher_diagonal(nn.DataParallel(model), TensorDataset(x, y)).sums.keys()
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "name", ["torchvision resnet18", "timm vit_tiny", "timm convnext_atto", "convolutions"]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cuda(name: str, layout: torch.memory_format) -> None:
    """Fails if a rule depends on the device or on the memory format."""
    model, x, y = double(name)
    truth = squared_gradients(model, x, y)
    model = model.to("cuda", memory_format=layout)
    found = fisher_diagonal(model, TensorDataset(x, y), batch_size=3)
    assert relative_error({n: s.cpu() for n, s in found.sums.items()}, truth) <= 1e-9


class Routed(nn.Module):
    """One of two experts, by the sign of the batch's mean: the same operations on other
    parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = int(x.detach().nan_to_num().mean() > 0)
        x = self.experts[first](x).tanh()
        return self.head(self.experts[0](x))


def test_experts_chosen_by_the_data() -> None:
    """Fails if a parameter is squared as in the probe although it is now used twice."""
    torch.manual_seed(0)
    model = Routed().double()
    x, y = torch.randn(8, 6, dtype=torch.float64).abs(), torch.arange(8)
    x[4:] *= -1  # the second batch goes through expert 0 twice
    truth = squared_gradients(model, x[:4], y[:4])
    for name, total in squared_gradients(model, x[4:], y[4:]).items():
        truth[name] += total
    found = fisher_diagonal(model, TensorDataset(x, y), batch_size=4)
    assert relative_error(found.sums, truth) <= 1e-9


class Bewildering(nn.Module):
    """Refuses tensors that are NaN, so that it cannot be probed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any():
            raise ZeroDivisionError("not a number")
        return self.head(x)


def test_model_that_refuses_nan() -> None:
    """Fails if a model that refuses NaN is measured wrongly, or one sample at a time: whose rows
    are whose then shows in the backward."""
    model = Bewildering().double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4)
    found = fisher_diagonal(model, TensorDataset(x, y))
    assert relative_error(found.sums, squared_gradients(model, x, y)) <= 1e-12
    assert not found.settings["one_sample_loop"]
