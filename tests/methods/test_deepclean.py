"""DeepClean's selection and reset: by product, by the stated parameters, pure, and honest about
noise."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepclean_hooks import DeepClean, FisherDiagonal, fisher_diagonal
from deepclean_hooks.methods.selecting import NOISE_IN_EPS, rounding_noise
from deepclean_hooks.stored.bits import differing
from lab.cases import CASES

VALUES = st.sampled_from([0.0, 1e-300, 0.25, 0.5, 1.0, 1.1, 2.0, 2.2, 3.0, 4.0, 1e12])


def diagonal(sums: list[float], count: int = 1, computed: str = "float64") -> FisherDiagonal:
    """A diagonal of one matrix with these sums."""
    tensor = torch.tensor([sums], dtype=torch.float64)
    return FisherDiagonal({"w": tensor}, count, torch.zeros(0), {"computed": computed})


@given(
    st.lists(st.tuples(VALUES, VALUES), min_size=1),
    st.sampled_from([0.5, 1.0, 1.1, 2.0]),
    st.integers(1, 50),
    st.integers(1, 50),
)
def test_selects_by_product(pairs: list[tuple[float, float]], gamma: float, n: int, m: int) -> None:
    """Fails if the comparison divides, adds an epsilon, or forgets that sums are of n and m
    samples."""
    forget = diagonal([2e-12 * max(f for f, _ in pairs) + f if f else 0.0 for f, _ in pairs], n)
    retain = diagonal([r for _, r in pairs], m)
    mask = DeepClean(gamma=gamma).select(forget, retain).masks["w"][0]
    for f, r, selected in zip(forget.sums["w"][0], retain.sums["w"][0], mask, strict=True):
        left = Fraction(float(f)) / n
        right = Fraction(gamma) * Fraction(float(r)) / m
        if left == 0:
            assert not selected  # 0/0 and 0/x stay
        elif abs(left - right) > Fraction(1, 10**12) * right:
            assert bool(selected) == (left > right)


def test_zeros_and_ties() -> None:
    """Fails if 0/0 is selected, x/0 is not, or a tie is."""
    mask = DeepClean(gamma=2.0).select(diagonal([0, 1, 2, 4]), diagonal([0, 0, 1, 1])).masks["w"]
    assert mask.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("gamma", [0, -1.0, float("nan"), float("inf"), "2", True, 10**400])
def test_gamma_must_be_positive(gamma: object) -> None:
    """Fails if a meaningless threshold is taken, or the value is not named."""
    with pytest.raises(
        ValueError, match='gamma must be a positive number, "careful" or "auto", got'
    ):
        DeepClean(gamma=gamma)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan"), True, 10**400])
def test_max_selected_must_be_a_share(share: float) -> None:
    """Fails if a meaningless cap is taken, or the value is not named."""
    with pytest.raises(ValueError, match="max_selected must be above 0 and at most 1, got"):
        DeepClean(gamma=2.0, max_selected=share)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.2])
def test_max_selected_keeps_the_highest_ratios(share: float) -> None:
    """Fails if the cap is exceeded, or other entries are kept than those of the largest
    I_Df / I_Dr, sorted; gamma alone selects more."""
    torch.manual_seed(0)
    sums = [torch.rand(40, 50, dtype=torch.float64).exp() for _ in range(2)]
    forget, retain = (FisherDiagonal({"w": s}, 1, torch.zeros(0), {}) for s in sums)
    chosen = DeepClean(gamma=1.1, max_selected=share).select(forget, retain)
    wide = DeepClean(gamma=1.1).select(forget, retain)
    most = int(share * 2000)
    assert wide.entries() > most
    highest = (sums[0] / sums[1]).flatten().topk(most).indices
    assert sorted(highest.tolist()) == chosen.masks["w"].flatten().nonzero().flatten().tolist()
    assert f"raised from 1.1 to select at most {share} of them" in chosen.criterion


def test_max_selected_that_holds_changes_nothing() -> None:
    """Fails if a cap that gamma keeps to changes the selection or its criterion."""
    pair = diagonal([0, 1, 2, 4, 9]), diagonal([0, 1, 1, 1, 1])
    plain, capped = (DeepClean(gamma=2.0, max_selected=cap).select(*pair) for cap in (None, 0.4))
    assert plain.masks["w"].sum() == 2
    assert torch.equal(plain.masks["w"], capped.masks["w"])
    assert plain.criterion == capped.criterion


def test_max_selected_names_entries_that_no_gamma_leaves() -> None:
    """Fails if entries without any information on the retain set exceed the cap unnoticed, or the
    search does not end."""
    with pytest.raises(ValueError, match="more than 1 entries have no Fisher information on the"):
        DeepClean(gamma=2.0, max_selected=0.5).select(diagonal([1, 2, 1]), diagonal([0, 0, 1]))


def selectable(method: DeepClean) -> set[str]:
    """Which parameters of a ResNet-18 the method measures."""
    model = CASES["torchvision resnet18"].model()
    return {n for n, p in model.named_parameters() if method.may_select(n, p)}


def test_which_parameters_may_be_selected() -> None:
    """Fails if norm affine or biases are selected by default, or a pattern or predicate is
    ignored."""
    names = {n for n, _ in CASES["torchvision resnet18"].model().named_parameters()}
    matrices = selectable(DeepClean())
    assert matrices
    assert not any("bn" in n or n.endswith("bias") for n in matrices)
    assert selectable(DeepClean(one_dimensional=True)) == names
    assert selectable(DeepClean(parameters="layer4.*")) == {
        n for n in matrices if n.startswith("layer4.")
    }
    assert selectable(DeepClean(parameters=("fc.*", "conv1.*"))) == {"fc.weight", "conv1.weight"}
    assert selectable(DeepClean(parameters=lambda n, p: p.dim() == 2)) == {"fc.weight"}


def key_biases() -> tuple[nn.Module, FisherDiagonal, FisherDiagonal]:
    """A transformers ViT, whose attention key biases have gradient 0, and two diagonals of it."""
    case = CASES["transformers vit"]
    model, (x, y) = case.model(), case.batch(12)
    return (
        model,
        fisher_diagonal(model, TensorDataset(x[:4], y[:4])),
        fisher_diagonal(model, TensorDataset(x[4:], y[4:])),
    )


def test_rounding_noise_is_not_selected() -> None:
    """Fails if noise over noise selects key biases, or if what is held back is not counted."""
    _, forget, retain = key_biases()
    keys = [n for n in forget.sums if "key.bias" in n or "k_proj.bias" in n]
    assert keys
    above = {n: forget.sums[n] * retain.count > 1.1 * retain.sums[n] * forget.count for n in keys}
    assert sum(int(m.sum()) for m in above.values()) > 0  # without the floor they would be selected
    selection = DeepClean(gamma=1.1, one_dimensional=True).select(forget, retain)
    assert not any(selection.masks[n].any() for n in keys)
    assert selection.held_back >= sum(int(m.sum()) for m in above.values())
    assert selection.held_back == sum(selection.held_back_by_layer.values())


def test_noise_floor_is_where_it_is_stated() -> None:
    """Fails if the floor is not (8 eps)^2 of the tensor's largest entry, in the precision of the
    gradients."""
    floor = (NOISE_IN_EPS * torch.finfo(torch.float32).eps) ** 2
    noise = rounding_noise(diagonal([1.0, 0.9 * floor, 1.1 * floor, 0.0], computed="float32"))
    assert noise["w"].tolist() == [[False, True, False, True]]
    assert not rounding_noise(diagonal([1.0, 0.9 * floor]))["w"].any()  # float64: far below


def test_select_is_pure() -> None:
    """Fails if selecting changes a diagonal or depends on an earlier call."""
    _, forget, retain = key_biases()
    before = {n: t.clone() for n, t in forget.sums.items()}
    method = DeepClean(gamma=1.1)
    one, other = method.select(forget, retain), method.select(forget, retain)
    assert all(torch.equal(one.masks[n], other.masks[n]) for n in one.masks)
    assert all(torch.equal(before[n], t) for n, t in forget.sums.items())


def test_new_values_are_zero() -> None:
    """Fails if a selected entry becomes anything but +0."""
    model, forget, retain = key_biases()
    method = DeepClean(gamma=1.1)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    values = method.new_values(weights, method.select(forget, retain), forget, retain)
    assert not any(differing(v, torch.zeros_like(v)).any() for v in values.values())
    assert all(v.shape == weights[n].shape for n, v in values.items())


@pytest.mark.parametrize("parameters", [3, ("*", 1), {"layer4": True}])
def test_parameters_of_another_kind_are_refused(parameters: object) -> None:
    """Fails if it comes out as Python's own error, in the middle of a measurement."""
    with pytest.raises(TypeError, match=r"parameters must be a name pattern .* got"):
        DeepClean(parameters=parameters)


def test_a_limit_that_leaves_nothing_is_named() -> None:
    """Fails if the advice is to lower gamma where max_selected is what selects nothing."""
    method = DeepClean(gamma=1.0, max_selected=1e-9)
    found = method.select(diagonal([3, 4, 5, 6]), diagonal([1, 1, 1, 1]))
    assert found.entries() == 0
    assert "gamma takes 4 entries" in found.advice
    assert found.advice.endswith("raise max_selected")
