"""The Fisher diagonal of every model in the table equals the one-sample-at-a-time truth."""

import pytest
from torch.utils.data import TensorDataset

from deepclean_hooks import fisher_diagonal
from lab.cases import CASES
from lab.reference import relative_error, squared_gradients

# The only parameters of the table that no rule serves.
LOOPED = {
    "no rule (cdist)": {"raw"},
    "custom function": {"weight"},
}

# Several seconds each; their layers are in other models of the table too.
LONG = {
    "timm coatnet",
    "timm efficientnet_lite0",
    "timm levit",
    "timm mobilevit_xxs",
    "timm nf_regnet_b0, norm-free",
    "timm poolformer_s12",
    "torchvision regnet_y_400mf",
    "torchvision vgg11_bn",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in CASES],
)
def test_equals_one_sample_at_a_time(name: str) -> None:
    """Fails if any rule, layout, pull-back or fallback is wrong, or if a parameter silently leaves
    the fast path."""
    case = CASES[name]
    model, (x, y) = case.model(), case.batch(7)
    truth = squared_gradients(model, x, y)

    single = fisher_diagonal(model, TensorDataset(x, y), batch_size=4)  # batches of 4 and 3
    assert relative_error(single.sums, truth, zero=1e-11) <= 1e-4
    assert set(single.settings["one_sample_loop"]) == LOOPED.get(name, set())

    x = x.double() if x.is_floating_point() else x
    double = fisher_diagonal(model.double(), TensorDataset(x, y), batch_size=4)
    assert relative_error(double.sums, truth) <= 1e-9
    assert double.count == 7
    assert set(double.settings["one_sample_loop"]) == LOOPED.get(name, set())
