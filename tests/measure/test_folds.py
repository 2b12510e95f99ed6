"""The Fisher diagonal of parts: the sum is the set's, the lowest mean that of the parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from deepclean_hooks import DeepClean, Session, fisher_diagonal
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.measure import classes
from deepclean_hooks.measure.folds import FoldedDiagonal, FoldedFisher
from deepclean_hooks.measure.request import Request


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def data(count: int = 40, outputs: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.arange(count) % outputs)


def folded(count: int, folds: int = 3) -> FoldedDiagonal:
    source = samples_of(data(count), name="forget", batch_size=4)
    return FoldedFisher(folds)(Request(network(), source, "forget", progress=False))


@pytest.mark.parametrize("count", [7, 12, 2])
def test_the_sum_is_that_of_the_set_and_the_lowest_that_of_the_parts(count: int) -> None:
    """Fails if a sample is left out or counted twice, or the lowest mean is of other samples."""
    found = folded(count)
    whole = fisher_diagonal(network(), data(count), progress=False)
    parts = [
        fisher_diagonal(network(), Subset(data(count), range(k, count, 3)), progress=False).mean()
        for k in range(min(3, count))
    ]
    assert found.parts == len(parts)
    assert torch.equal(found.samples, whole.samples)
    for name, total in whole.sums.items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-12, atol=0)
        lowest = torch.stack([part[name] for part in parts]).amin(0)
        torch.testing.assert_close(found.lowest[name], lowest, rtol=1e-12, atol=0)


def test_a_single_sample_has_no_parts() -> None:
    """Fails if one sample is compared with itself and so agrees with itself."""
    found = folded(1)
    assert found.lowest == {}
    assert found.count == 1


def test_classes_are_counted_added_and_subtracted() -> None:
    """Fails if a stored diagonal that lost a class still says that it holds it."""
    everything = fisher_diagonal(network(), data(40), progress=False)
    first = fisher_diagonal(network(), Subset(data(40), range(0, 40, 4)), progress=False)
    assert everything.settings["classes"] == {"0": 10, "1": 10, "2": 10, "3": 10}
    assert (everything - first).settings["classes"] == {"1": 10, "2": 10, "3": 10}
    assert (everything - first + first).settings == everything.settings
    assert classes.shared({"0": 1, "10": 2, "2": 1}, {"10": 1, "2": 5}) == ["2", "10"]
    assert classes.shared(None, {"1": 1}) is None


def selected(method: DeepClean, forget: Subset, retain: Subset) -> tuple[int, str, tuple[str, ...]]:
    run = Session(network(), method, scores=False, progress=False, batch_size=8)
    run.measure(forget, retain)
    report = run.select()
    run.close()
    assert report.selected_entries is not None
    assert report.criterion is not None
    return report.selected_entries, report.criterion, report.warnings


def test_random_samples_must_agree_in_every_part() -> None:
    """Fails if the default resets what a few samples make large by chance, as gamma 2 does."""
    forget, retain = Subset(data(), range(6)), Subset(data(), range(6, 40))
    literal, _, told = selected(DeepClean(gamma=2.0), forget, retain)
    assert any("of so few samples the ratio is mostly chance" in text for text in told)
    with pytest.warns(UserWarning, match="nothing was selected.*ReferenceGuided"):
        careful, criterion, warnings = selected(DeepClean(), forget, retain)
    assert literal > 0
    assert careful == 0
    assert "in each of 3 parts of D_f" in criterion
    assert len(warnings) == 1


def test_a_single_random_sample_selects_nothing() -> None:
    """Fails if a set that cannot be parted is taken to agree."""
    forget, retain = Subset(data(), [0]), Subset(data(), range(1, 40))
    with pytest.warns(UserWarning, match="nothing was selected"):
        assert selected(DeepClean(), forget, retain)[0] == 0


@pytest.mark.filterwarnings("error")
def test_a_whole_class_is_selected_as_by_gamma_2_within_the_limit() -> None:
    """Fails if the parts of a class must agree, or the limit is gone."""
    forget = Subset(data(), range(0, 40, 4))
    retain = Subset(data(), [i for i in range(40) if i % 4])
    careful = selected(DeepClean(), forget, retain)
    assert careful == selected(DeepClean(gamma=2.0, max_selected=0.1), forget, retain)
    assert careful[0] > 0
