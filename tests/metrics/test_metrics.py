"""Distances, calibration, probe, relearning, histograms and the spread between gold models.

N: samples, C: classes.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from deepclean_hooks.metrics import distance, outputs
from deepclean_hooks.metrics.calibration import calibration_error
from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.metrics.gold import AVERAGED, spreads
from deepclean_hooks.metrics.relearn import relearn_steps
from deepclean_hooks.stored import bits
from lab.planted import CLASSES, FORGET, RETAIN, SETS, TEST, WIDTH, gold, network, original
from lab.processes import on_two_ranks


def logits(model: nn.Module, data: TensorDataset) -> Tensor:
    with torch.no_grad():
        return model(data.tensors[0]).double()


def test_distances_agree_with_scipy_on_stored_logits() -> None:
    """Fails if the divergence is divided by the classes, in nats, or a square root."""
    one, other = logits(original(), FORGET), logits(gold(), FORGET)
    p, q = one.softmax(1).numpy(), other.softmax(1).numpy()
    found = evaluate(original(), forget=FORGET, gold=gold()).distances
    expected = {
        "js_divergence": np.mean([jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q)]),  # noqa: B905
        "activation_distance": np.mean(np.linalg.norm(p - q, axis=1)),
        "completeness": 100 * np.mean(p.argmax(1) == q.argmax(1)),
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-5)
        assert found[name].gold_to_gold is None


def test_distances_between_gold_models_stand_beside() -> None:
    """Fails if the noise floor of a distance is missing or is of one pair only."""
    golds = [gold(seed) for seed in (10, 11, 12)]
    found = evaluate(gold(13), forget=FORGET, gold=golds).distances["js_divergence"]
    each = [logits(g, FORGET) for g in golds]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = statistics.fmean(
        float(distance.js_divergence(each[i], each[j]).mean()) for i, j in pairs
    )
    assert found.gold_to_gold == pytest.approx(expected, rel=1e-5)
    assert found.value == pytest.approx(expected, rel=0.2)
    memorised = evaluate(original(), forget=FORGET, gold=golds).distances["js_divergence"]
    assert memorised.value is not None
    assert memorised.value > 1.5 * expected


def test_js_divergence_runs_from_0_to_1() -> None:
    """Fails if equal outputs differ, or outputs with nothing in common are not 1 bit apart."""
    certain = torch.tensor([[0.0, -math.inf], [800.0, 0.0]])
    assert distance.js_divergence(certain, certain).tolist() == [0, 0]
    assert distance.js_divergence(certain, certain.flip(1)).tolist() == pytest.approx([1, 1])


def test_zrf_is_1_for_an_untrained_model_and_less_for_a_trained_one() -> None:
    """Fails if ZRF is a similarity of something else, or is told without an untrained model."""
    untrained = network(99)
    assert evaluate(network(99), forget=FORGET, untrained=untrained).zrf.value == pytest.approx(1)
    found = evaluate(original(), forget=FORGET, untrained=untrained, gold=gold())
    assert found.zrf.value is not None
    assert found.zrf.value < 0.8
    assert "zrf" in found.gaps
    assert "untrained=" in str(evaluate(original(), forget=FORGET).zrf.reason)


def test_calibration_error_by_hand() -> None:
    """Fails if bins are weighted alike, or a certain sample falls out of the last bin."""
    highest = torch.tensor([1.0, 1.0, 0.95, 0.35, 0.34], dtype=torch.float64)
    correct = torch.tensor([True, False, True, False, True])
    top = 3 / 5 * abs(2 / 3 - 2.95 / 3)
    low = 2 / 5 * abs(1 / 2 - 0.69 / 2)
    assert calibration_error(highest, correct) == pytest.approx(100 * (top + low))
    found = evaluate(original(), forget=FORGET, test=TEST).sets
    assert found["forget"].calibration_error < 2
    assert found["test"].calibration_error > 50


def test_probe_finds_a_class_that_the_head_denies_and_no_noise() -> None:
    """Fails if the probe looks at the logits, or at samples it was fitted on."""
    x = torch.randn(600, WIDTH, generator=torch.Generator().manual_seed(5))
    y = x[:, :CLASSES].argmax(dim=1)
    data = TensorDataset(x, y)
    forget, seen = y[:400] == 0, torch.arange(400)
    sets = {
        "forget": Subset(data, seen[forget].tolist()),
        "retain": Subset(data, seen[~forget].tolist()),
        "test": Subset(data, range(400, 600)),
    }
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(WIDTH))
        model[1].weight.copy_(torch.eye(CLASSES, WIDTH))
        model[1].weight[0], model[1].bias[0] = 0, -100  # the head never says 0
    hidden = evaluate(model, **sets, probe=True)
    assert hidden.sets["forget"].accuracy == 0
    assert hidden.probe.value is not None
    assert hidden.probe.value > 60
    with torch.no_grad():
        model[0].weight[0] = 0  # the feature itself is gone
    gone = evaluate(model, **sets, probe=True, gold=model)
    assert gone.probe.value is not None
    assert gone.probe.value < 40
    assert gone.gaps["probe"] == 0
    assert evaluate(model, **sets).probe.value is None


class NoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def test_what_the_probe_cannot_do_is_said() -> None:
    """Fails if a model whose last layer is not linear gets the features of another layer."""
    found = evaluate(NoHead(), **SETS, probe=True).probe
    assert found.value is None
    assert "no linear layer" in str(found.reason)


def test_kept_features_are_spread_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if all features are kept, or only those of the first samples."""
    monkeypatch.setattr(outputs, "MOST_FEATURES", 7)
    at = torch.arange(50)
    kept = at[outputs._spread(at, 50)]
    assert len(kept) == 7
    assert kept.diff().max() - kept.diff().min() <= 1
    assert outputs._spread(at, None).sum() == 7


def test_too_many_logits_are_the_reason_for_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if memory grows with the forget set without bound, or a distance is missing without a
    word."""
    monkeypatch.setattr(outputs, "MOST_LOGITS", 100)
    found = evaluate(original(), **SETS, gold=gold())
    assert found.distances["js_divergence"].value is None
    assert "exceed 100" in str(found.distances["js_divergence"].reason)
    assert found.outputs["forget"].logits is None


def test_relearning_is_faster_where_it_was_only_hidden() -> None:
    """Fails if steps are not counted, or the model is trained itself."""
    model, target = original(), 1.0
    hidden = network()
    hidden.load_state_dict(model.state_dict())
    with torch.no_grad():
        hidden[2].weight.add_(0.25 * torch.randn(hidden[2].weight.shape))
    before = bits.digest(dict(hidden.named_parameters()))
    random = torch.get_rng_state()
    options = {"to_loss": target, "lr": 0.01, "batch_size": 50}
    steps = [relearn_steps(m, FORGET, **options).value for m in (model, hidden, gold())]
    assert steps[0] == 0
    assert steps[1] is not None
    assert steps[2] is not None
    assert 0 < steps[1] < steps[2] / 2
    assert bits.digest(dict(hidden.named_parameters())) == before
    assert torch.equal(torch.get_rng_state(), random)
    never = relearn_steps(gold(), FORGET, **{**options, "to_loss": 0.0, "most": 3})
    assert never.value is None
    assert "3 steps" in str(never.reason)


def test_gap_within_what_gold_models_differ_by_is_told_as_such() -> None:
    """Fails if a model that memorised the forget set passes, or the spread is of something else."""
    golds = [evaluate(gold(seed), **SETS) for seed in (10, 11, 12)]
    found = evaluate(original(), **SETS, gold=golds)
    inside = found.within_spread()
    assert inside.keys() == found.gaps.keys()
    assert not inside["forget.accuracy"]
    assert not inside["attack.loss_regression.accuracy"]
    one = found.spread["test.loss"]
    values = [g.figures()["test.loss"] for g in golds]
    assert (one.count, one.lowest, one.highest) == (3, min(values), max(values))
    assert one.mean == pytest.approx(np.mean(values))
    assert one.deviation == pytest.approx(np.std(values, ddof=1))
    assert found.gaps["test.loss"] == pytest.approx(found.figures()["test.loss"] - one.mean)
    assert "gaps are within what the 3 gold models differ by" in str(found)
    again = evaluate(gold(13), **SETS, gold=golds).within_spread()
    assert sum(again.values()) > 0.6 * len(again)
    assert evaluate(original(), **SETS, gold=golds[0]).within_spread() == {}


def test_spread_needs_every_gold_model() -> None:
    """Fails if a figure that one gold model lacks is averaged over the others."""
    assert list(spreads([{"a": 1.0, "b": 2.0}, {"b": 4.0}])) == ["b"]
    assert spreads([{"b": 2.0}, {"b": 4.0}])["b"].holds(2.1) is False
    assert spreads([{"b": 2.0}])["b"].holds(0.0) is None


def test_average_gap_by_hand() -> None:
    """Fails if signs cancel, fractions are mixed with per cent, or a part is missing silently."""
    golds = [evaluate(gold(seed), **SETS) for seed in (10, 11)]
    found = evaluate(original(), **SETS, gold=golds)
    expected = statistics.fmean(abs(found.gaps[name]) for name in AVERAGED)
    assert found.average_gap.value == pytest.approx(expected)
    between = statistics.fmean(
        abs(golds[0].figures()[name] - golds[1].figures()[name]) for name in AVERAGED
    )
    assert found.average_gap.gold_to_gold == pytest.approx(between)
    poor = evaluate(original(), forget=FORGET, retain=RETAIN, gold=gold()).average_gap
    assert poor.value is None
    assert "test.accuracy" in str(poor.reason)


def test_histograms_count_every_sample_once() -> None:
    """Fails if a certain sample, or a loss beyond the last edge, is in no bin."""
    found = evaluate(original(), **SETS).histograms
    for name, data in SETS.items():
        assert sum(found[name]["confidence"]) == sum(found[name]["loss"]) == len(data)
    assert found["forget"]["confidence"][-1] > 140
    assert len(found["forget"]["confidence"]) == 20


def test_outputs_by_sample_are_those_of_the_model() -> None:
    """Fails if samples are put back in another order than that of the set."""
    found = evaluate(original(), forget=FORGET, batch_size=7).outputs["forget"]
    stored = logits(original(), FORGET)
    assert torch.equal(found.labels, FORGET.tensors[1])
    assert found.logits is not None
    assert torch.allclose(found.logits.double(), stored, atol=1e-5)
    own = stored.log_softmax(1).gather(1, FORGET.tensors[1][:, None])[:, 0]
    assert torch.allclose(found.loss, -own, atol=1e-5)
    assert torch.allclose(found.margin, torch.logit(own.exp()), atol=1e-3)
    assert dataclasses.is_dataclass(found)


def on_one_of_two_ranks(rank: int) -> dict[str, object]:
    options = {"gold": [gold(10), gold(11)], "untrained": network(99), "probe": True}
    found = evaluate(original(), **SETS, **options, batch_size=100)
    distances = {name: distance.value for name, distance in found.distances.items()}
    return {"figures": found.figures(), "gaps": found.gaps, "distances": distances}


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    """Fails if a rank attacks its own half, or puts logits or features back in another order."""
    options = {"gold": [gold(10), gold(11)], "untrained": network(99), "probe": True}
    expected = evaluate(original(), **SETS, **options, batch_size=100)
    for found in on_two_ranks(on_one_of_two_ranks, tmp_path):
        assert found["figures"] == pytest.approx(expected.figures(), rel=1e-4, abs=1e-4)
        assert found["gaps"] == pytest.approx(expected.gaps, rel=1e-4, abs=1e-3)
        distances = {n: one.value for n, one in expected.distances.items()}
        assert found["distances"] == pytest.approx(distances, rel=1e-4)
