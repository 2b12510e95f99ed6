"""U-LiRA and KLoM on planted pools and by another route; pools that are trained once and kept.

M: models, N: samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy, norm
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from deepclean_hooks.metrics.pools import FLOOR, klom, margins, ulira
from deepclean_hooks.metrics.train_pool import split_jobs, train_pool
from lab.planted import FORGET, RETAIN, fitted, gold, joined, network, original


def pool(models: int, samples: int, mean: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(models, samples, generator=generator, dtype=torch.float64)


def test_margins_are_the_rescaled_logits() -> None:
    """Fails if the own class is left in the logsumexp, or models and samples change places."""
    found = margins([original(), gold()], FORGET, batch_size=40)
    assert found.shape == (2, len(FORGET))
    with torch.no_grad():
        p = gold()(FORGET.tensors[0]).double().softmax(1)
    own = p.gather(1, FORGET.tensors[1][:, None])[:, 0]
    assert torch.allclose(found[1], torch.logit(own), atol=1e-4)
    assert found[0].mean() > found[1].mean() + 5


def test_ulira_tells_memorising_pools_apart_and_equal_ones_not() -> None:
    """Fails if a model is judged by a fit that it is part of: equal pools would come out far from
    50 %; or if unlearned and retrained change places."""
    found = ulira(pool(8, 400, 6.0, 0), pool(8, 400, 0.0, 1))
    assert found.figures["accuracy"] > 97
    assert found.figures["auc"] > 0.98
    equal = ulira(pool(8, 400, 0.0, 2), pool(8, 400, 0.0, 3))
    assert equal.figures["accuracy"] == pytest.approx(50, abs=3)
    assert equal.figures["auc"] == pytest.approx(0.5, abs=0.03)
    assert equal.figures["tpr_at_1_percent_fpr"] < 3


def test_ulira_agrees_with_scipy() -> None:
    """Fails if the deviation, the leaving-out or the tie is computed in another way."""
    one, other = pool(4, 5, 1.0, 4), pool(5, 5, 0.0, 5)

    def ratio(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        fits = [norm(m.mean(0), m.std(0, ddof=1)) for m in (a, b)]
        return fits[0].logpdf(x) - fits[1].logpdf(x)

    a, b = one.numpy(), other.numpy()
    members = [ratio(a[i], np.delete(a, i, 0), b) for i in range(4)]
    others = [ratio(b[i], a, np.delete(b, i, 0)) for i in range(5)]
    expected = 50 * (np.mean(np.array(members) > 0) + np.mean(np.array(others) < 0))
    assert ulira(one, other).figures["accuracy"] == pytest.approx(expected)


def test_constant_margins_are_no_division_by_zero() -> None:
    """Fails if models that all agree on a sample end in NaN."""
    found = ulira(torch.zeros(3, 4), torch.zeros(3, 4))
    assert found.figures["accuracy"] == 50
    assert klom(torch.zeros(3, 4), torch.zeros(4, 4)).mean == pytest.approx(0, abs=1e-12)


def test_klom_agrees_with_scipy_in_the_right_direction() -> None:
    """Fails if the arguments are swapped, or the largest margin falls out of the last bin."""
    one, other = pool(50, 6, 1.0, 6), pool(60, 6, 0.0, 7)
    expected = []
    for a, b in zip(one.T.numpy(), other.T.numpy(), strict=True):
        edges = np.histogram_bin_edges(np.concatenate([a, b]), bins=20)
        p, q = (np.histogram(m, bins=edges)[0] / len(m) + FLOOR for m in (a, b))
        assert round((p - FLOOR).sum(), 9) == round((q - FLOOR).sum(), 9) == 1
        expected.append(entropy(p, q))
    found = klom(one, other)
    assert found.per_sample.tolist() == pytest.approx(expected, rel=1e-6)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.percentile_95 == pytest.approx(np.quantile(expected, 0.95))
    assert found.mean != pytest.approx(klom(other, one).mean, rel=0.05)


def test_klom_stands_beside_its_floor() -> None:
    """Fails if the noise between retrained models is not told, or is told of one model."""
    found = klom(pool(100, 50, 5.0, 8), pool(100, 50, 0.0, 9))
    assert found.floor_mean is not None
    assert found.mean > 3 * found.floor_mean
    equal = klom(pool(100, 50, 0.0, 10), pool(100, 50, 0.0, 11))
    assert equal.floor_mean is not None
    assert equal.mean < 1.5 * equal.floor_mean
    assert klom(pool(3, 5, 0.0, 1), pool(3, 5, 0.0, 2)).floor_mean is None


def test_bad_pools_are_named() -> None:
    """Fails if pools of different samples, or too few models, end in figures."""
    with pytest.raises(ValueError, match="same samples, got 5 unlearned and 6 retrained"):
        ulira(pool(3, 5, 0, 0), pool(3, 6, 0, 0))
    with pytest.raises(ValueError, match="margins \\(models, samples\\)"):
        klom(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="NaN or infinite"):
        klom(torch.full((3, 1), math.nan), torch.zeros(3, 1))
    found = ulira(pool(2, 5, 0, 0), pool(3, 5, 0, 1))
    assert not found.figures
    assert "3 models of a kind" in found.reasons["accuracy"]
    with pytest.raises(ValueError, match="at least one model"):
        margins([], FORGET)


def test_stopped_pool_goes_on_and_trains_each_model_once(tmp_path: Path) -> None:
    """Fails if a pool that was stopped starts anew, or a half-written model is taken for whole."""
    data, trained = joined(FORGET, RETAIN), []

    def train(seed: int, indices: Sequence[int]) -> nn.Module:
        if seed == 2 and 2 not in trained:
            trained.append(seed)
            raise KeyboardInterrupt
        trained.append(seed)
        return fitted(TensorDataset(*(t[list(indices)] for t in data.tensors)), seed, steps=3)

    jobs = [(1, range(0, 300)), (2, range(0, 300)), (2, range(300, 600))]
    with pytest.raises(KeyboardInterrupt):
        train_pool(train, jobs, tmp_path, build=network)
    (tmp_path / ".seed2-half").write_bytes(b"half")
    models = list(train_pool(train, jobs, tmp_path, build=network))
    assert trained == [1, 2, 2, 2]
    again = list(train_pool(train, jobs, tmp_path, build=network))
    assert trained == [1, 2, 2, 2]
    rows = [margins(one, Subset(data, range(20))) for one in (models, again)]
    assert torch.equal(*rows)
    assert not torch.equal(rows[0][1], rows[0][2])


def test_split_jobs_leave_the_forget_set_out_of_one_half() -> None:
    """Fails if two models share a seed, or a model without the forget set has seen it."""
    with_, without = split_jobs(10, [2, 5], models=3, first_seed=4)
    assert [seed for seed, _ in with_ + without] == [4, 5, 6, 7, 8, 9]
    assert all(indices == list(range(10)) for _, indices in with_)
    assert all(indices == [0, 1, 3, 4, 6, 7, 8, 9] for _, indices in without)
    with pytest.raises(ValueError, match="forget index 10"):
        split_jobs(10, [10], models=1)
