"""Class projection: the singular vectors of stored activations, layer kind by layer kind."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.measure.layer_inputs import InputGrams, LayerInputs, SampledPatches
from deepclean_hooks.measure.request import Request
from deepclean_hooks.methods.class_projection import ClassProjection
from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.stored.bits import differing
from deepclean_hooks.tuning.search import search

ALPHAS = (100.0, 3.0)


class Attention(nn.Module):
    """nn.MultiheadAttention of one input, or of other keys (and values) than queries; a head."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        k = x if self.inputs == 1 else x.flip(1) * 2 + 1
        v = k if self.inputs < 3 else x.square()
        return self.head(self.attn(x, k, v, need_weights=False)[0].mean(1))


class Fused(nn.Module):
    """One projection for queries, keys and values, as in timm, called functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))


class Pool(nn.Module):
    """A body, a mean over places, and a head."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().flatten(2).mean(2))


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (6,)),
    "conv1d": (lambda: Pool(nn.Conv1d(3, 5, 3, stride=2, padding=1), 5), (3, 9)),
    "conv2d": (lambda: Pool(nn.Conv2d(3, 5, 3), 5), (3, 6, 7)),
    "conv3d": (lambda: Pool(nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), 4), (2, 3, 4, 5)),
    "groups": (lambda: Pool(nn.Conv2d(4, 6, 3, groups=2, padding=1), 6), (4, 5, 5)),
    "depthwise": (lambda: Pool(nn.Conv2d(4, 8, (3, 2), groups=4), 8), (4, 5, 5)),
    "dilation": (lambda: Pool(nn.Conv2d(3, 5, 3, dilation=2, padding=2), 5), (3, 7, 7)),
    "same": (lambda: Pool(nn.Conv2d(3, 5, (2, 3), padding="same"), 5), (3, 6, 6)),
    "reflect": (
        lambda: Pool(nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), 5),
        (3, 6, 6),
    ),
    "circular": (
        lambda: Pool(nn.Conv1d(3, 5, 3, padding=2, padding_mode="circular"), 5),
        (3, 8),
    ),
    "attention": (lambda: Attention(1), (5, 8)),
    "attention, other keys": (lambda: Attention(2), (5, 8)),
    "attention, other values": (lambda: Attention(3), (5, 8)),
    "fused": (Fused, (5, 8)),
}


def build(kind: str) -> nn.Module:
    """The seeded model of a kind, in float64."""
    torch.manual_seed(0)
    return KINDS[kind][0]().double().eval()


def sets(kind: str, forgotten: tuple[int, ...] = (0,)) -> tuple[TensorDataset, TensorDataset]:
    """40 seeded samples, parted by class."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(40) % 4
    x = torch.randn(40, *KINDS[kind][1], generator=generator, dtype=torch.float64)
    x += y.view(-1, *[1] * (x.dim() - 1)) * torch.randn(
        1, *KINDS[kind][1], generator=generator, dtype=torch.float64
    )
    gone = torch.isin(y, torch.tensor(forgotten))
    return TensorDataset(x[gone], y[gone]), TensorDataset(x[~gone], y[~gone])


def identity_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """The inputs of each output of a convolution, (L, G, D): what kernels that are unit vectors
    give, which is another route than cutting patches."""
    kernel = module.weight.shape[1:]  # (C / G, *K)
    size, groups = kernel.numel(), module.groups
    units = torch.eye(size, dtype=x.dtype).view(size, *kernel).repeat(groups, *[1] * len(kernel))
    probe = type(module)(
        module.in_channels, size * groups, kernel[1:], module.stride, module.padding,
        module.dilation, groups, False, module.padding_mode,
    ).double()  # fmt: skip
    probe.weight.data = units
    out = probe(x).flatten(2)  # (N, G D, P)
    return out.transpose(1, 2).reshape(-1, groups, size)


def stored_inputs(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """The activations A (G, L, D) of each weight, stored by module hooks and by hand."""
    kept: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def store(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(module, nn.Linear):
                rows = args[0].reshape(-1, 1, args[0].shape[-1])
            else:
                rows = identity_inputs(module, args[0])
            kept[f"{name}.weight"] = [rows.transpose(0, 1)]

        return store

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [
        m.register_forward_hook(hook(n))
        for n, m in model.named_modules()
        if isinstance(m, layers) and "out_proj" not in n
    ]
    model(x)
    for handle in handles:
        handle.remove()
    if isinstance(model, Fused):
        kept["qkv.weight"] = [x.reshape(1, -1, 8)]
    if isinstance(model, Attention):
        by_hand(model, x, kept)
    return kept


def by_hand(model: Attention, x: Tensor, kept: dict[str, list[Tensor]]) -> None:
    """The inputs of both projections of attention, from its formula."""
    k = x if model.inputs == 1 else x.flip(1) * 2 + 1
    v = k if model.inputs < 3 else x.square()
    inputs = [x, k, v]
    kept["attn.in_proj_weight"] = [t.reshape(1, -1, 8) for t in inputs]
    w, b = model.attn.in_proj_weight, model.attn.in_proj_bias
    q, k, v = (
        (t @ w[8 * i : 8 * i + 8].T + b[8 * i : 8 * i + 8]).unflatten(2, (2, 4)).transpose(1, 2)
        for i, t in enumerate(inputs)
    )
    mixed = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2)
    kept["attn.out_proj.weight"] = [mixed.reshape(1, -1, 8)]


def projected(weight: Tensor, retain: Tensor, forget: Tensor) -> Tensor:
    """W P^T by the singular value decomposition of the activations (G, L, D), as in the paper."""

    def space(a: Tensor, alpha: float) -> Tensor:
        u, s, _ = torch.linalg.svd(a.T, full_matrices=False)
        share = s**2 / (s**2).sum()
        return u @ torch.diag(alpha * share / ((alpha - 1) * share + 1)) @ u.T

    parts = []
    for w, r, f in zip(weight.chunk(len(retain)), retain, forget, strict=True):
        kept, gone = space(r, ALPHAS[0]), space(f, ALPHAS[1])
        p = torch.eye(r.shape[1], dtype=r.dtype) - (gone - gone @ kept)
        parts.append((w.flatten(1) @ p.T).view_as(w))
    return torch.cat(parts)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # on an even kernel, where sides differ
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forgotten", [(0,), (1, 3)], ids=["one class", "two classes"])
@torch.no_grad()
def test_equals_the_decomposition_of_stored_activations(
    kind: str, forgotten: tuple[int, ...]
) -> None:
    """Fails if a patch is missing, doubled or in another order, a group sees another group's
    inputs, a projection of attention is passed over, or only the first class is forgotten."""
    model, original = build(kind), build(kind)
    forget, retain = sets(kind, forgotten)
    run = deepclean.Session(model, ClassProjection(*ALPHAS), scores=False, batch_size=7)
    run.measure(forget, retain).select()
    run.reset()
    gone = stored_inputs(original, forget.tensors[0])
    kept = stored_inputs(original, retain.tensors[0])
    expected = {n: p.detach().clone() for n, p in original.named_parameters()}
    for name, inputs in kept.items():
        parts = expected[name].chunk(len(inputs))
        expected[name] = torch.cat(
            [projected(w, r, f) for w, r, f in zip(parts, inputs, gone[name], strict=True)]
        )
    matrices = {n for n, p in original.named_parameters() if p.dim() > 1}
    assert kept.keys() == matrices
    for name, p in model.named_parameters():
        if name in matrices:
            assert (p - original.get_parameter(name)).abs().max() > 1e-3
            torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-8)
        else:
            assert not differing(p, expected[name]).any()


def grams(kind: str, data: TensorDataset, how: LayerInputs, batch_size: int = 7) -> InputGrams:
    """The Gram matrices of a set."""
    source = samples_of(data, batch_size=batch_size)
    return how(Request(build(kind), source, parameters=lambda n, p: p.dim() > 1))


def test_sums_add_up_and_are_stored(tmp_path: object) -> None:
    """Fails if D - D_f is not D_r, its classes are wrong, or a file loses anything."""
    forget, retain = sets("conv2d")
    one, rest = (grams("conv2d", data, LayerInputs()) for data in (forget, retain))
    whole = one + rest
    assert whole.settings["classes"] == {"0": 10, "1": 10, "2": 10, "3": 10}
    back = whole - one
    assert back.settings["classes"] == rest.settings["classes"] == {"1": 10, "2": 10, "3": 10}
    for name, total in back.sums.items():
        torch.testing.assert_close(total, rest.sums[name], rtol=1e-12, atol=1e-12)
    whole.save(tmp_path / "grams.safetensors")
    read = InputGrams.load(tmp_path / "grams.safetensors")
    assert read.settings == whole.settings
    model = build("conv2d")
    run = deepclean.Session(model, ClassProjection(*ALPHAS), scores=False).measure(forget, read)
    run.select()
    run.reset()
    direct = build("conv2d")
    run = deepclean.Session(direct, ClassProjection(*ALPHAS), scores=False).measure(forget, retain)
    run.select()
    run.reset()
    for p, q in zip(model.parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_sampled_patches_are_a_sample() -> None:
    """Fails if the compatibility option measures every patch, or is not reproducible; the exact
    one does not change with the batch size, and this one does."""
    data = sets("conv2d")[1]
    sampled = LayerInputs(patches=SampledPatches(most=50))
    one, again = grams("conv2d", data, sampled), grams("conv2d", data, sampled)
    other = grams("conv2d", data, sampled, batch_size=30)
    exact, same = grams("conv2d", data, LayerInputs()), grams("conv2d", data, LayerInputs(), 30)
    name = "body.weight"
    assert torch.equal(one.sums[name], again.sums[name])
    assert not torch.allclose(one.sums[name], other.sums[name])
    torch.testing.assert_close(exact.sums[name], same.sums[name], rtol=1e-12, atol=1e-12)
    assert one.sums[name].diagonal(0, 1, 2).sum() < exact.sums[name].diagonal(0, 1, 2).sum()


def test_measuring_leaves_no_trace() -> None:
    """Fails if attention's fused path stays off, or a mode stays on."""
    before = torch.backends.mha.get_fastpath_enabled()
    forget, _ = sets("attention")
    grams("attention", forget, LayerInputs())
    assert torch.backends.mha.get_fastpath_enabled() == before
    from torch.overrides import _get_current_function_mode

    assert _get_current_function_mode() is None


def test_a_random_subset_is_refused() -> None:
    """Fails if samples of a class that stays are projected away, or no way out is named."""
    forget, retain = sets("linear")
    x, y = retain.tensors
    part, rest = TensorDataset(x[:5], y[:5]), TensorDataset(x[5:], y[5:])
    run = deepclean.Session(build("linear"), ClassProjection(), scores=False).measure(part, rest)
    with pytest.raises(ValueError, match=r"3 classes are in the retain set .* use DeepClean\("):
        run.select()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    odd = [TensorDataset(*d.tensors, d.tensors[1]) for d in (forget, retain)]
    run = deepclean.Session(build("linear"), ClassProjection(), scores=False, loss_fn=loss_fn)
    with pytest.raises(ValueError, match="found no class labels"):
        run.measure(*odd).select()


def test_search_scores_the_training_data_and_changes_nothing() -> None:
    """Fails if a score is not that of the projected model, or the order is wrong, or the model
    moves."""
    model, (forget, retain) = build("linear"), sets("linear")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grid = ClassProjection().grid(alphas_retain=(10, 100), alphas_forget=(1, 30))
    found = search(model, forget, retain, grid, progress=False)
    assert not any(differing(p, before[n]).any() for n, p in model.named_parameters())
    assert len(found) == 4
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    run = deepclean.Session(model, found[0].method, scores=False).measure(forget, retain)
    run.select()
    run.reset()
    scores = evaluate(model, forget=forget, retain=retain, membership=False).sets
    expected = scores["retain"].accuracy / 100 * (1 - scores["forget"].accuracy / 100)
    assert found[0].score == pytest.approx(expected)


@pytest.mark.parametrize("name", ["alpha_retain", "alpha_forget"])
def test_alphas_must_be_positive(name: str) -> None:
    """Fails if a scaling that means nothing is taken."""
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got 0"):
        ClassProjection(**{name: 0})
