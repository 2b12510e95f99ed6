"""Every attack on a planted case and its opposite, and each figure by another route from stored
logits.

N: samples, C: classes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from deepclean_hooks.metrics import attack
from deepclean_hooks.metrics.attack import THRESHOLDS
from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.metrics.evaluation import Evaluation
from deepclean_hooks.metrics.outputs import Outputs, scores_of
from deepclean_hooks.metrics.rmia import GAMMA, OFFLINE, scores
from lab.planted import CLASSES, FORGET, RETAIN, SETS, TEST, gold, network, original

# (figure, at least this where the forget set was memorised, at most this far from the aim where it
# was never seen, the aim); the bounds leave room for 150 forget samples: a standard error of AUC
# 0.024 and of a balanced accuracy 2.1 %.
BOUNDS = [
    ("attack.loss_regression.accuracy", 90.0, 8.0, 50.0),
    ("attack.threshold_loss.auc", 0.95, 0.08, 0.5),
    ("attack.threshold_modified_entropy.auc", 0.95, 0.08, 0.5),
    ("attack.threshold_margin.auc", 0.95, 0.08, 0.5),
    ("attack.threshold_confidence.auc", 0.85, 0.08, 0.5),
    ("attack.threshold_entropy.auc", 0.85, 0.08, 0.5),
    ("attack.rmia.auc", 0.95, 0.08, 0.5),
    ("attack.rmia.tpr_at_1_percent_fpr", 50.0, 4.0, 1.0),
    ("attack.rmia.tpr_at_0.1_percent_fpr", 30.0, 2.0, 0.1),
    ("attack.threshold_loss.tpr_at_1_percent_fpr", 30.0, 4.0, 1.0),
]


@pytest.fixture(scope="module")
def golds() -> list[Evaluation]:
    return [evaluate(gold(seed), **SETS, batch_size=500) for seed in (10, 11, 12)]


@pytest.fixture(scope="module")
def memorised(golds: list[Evaluation]) -> Evaluation:
    return evaluate(original(), **SETS, gold=golds, batch_size=500)


@pytest.fixture(scope="module")
def retrained(golds: list[Evaluation]) -> Evaluation:
    return evaluate(gold(13), **SETS, gold=golds, batch_size=500)


@pytest.mark.parametrize(("figure", "caught", "room", "aim"), BOUNDS)
def test_memorised_is_caught_and_a_retrain_is_not(
    memorised: Evaluation,
    retrained: Evaluation,
    figure: str,
    caught: float,
    room: float,
    aim: float,
) -> None:
    """Fails if an attack is turned round, looks at the wrong samples, or sees nothing."""
    assert memorised.figures()[figure] >= caught
    assert retrained.figures()[figure] == pytest.approx(aim, abs=room)


def test_confidence_svc_says_forgotten_of_a_retrain_only(
    memorised: Evaluation, retrained: Evaluation
) -> None:
    """Fails if the efficacy is the share of members instead of 1 minus it: higher is forgotten."""
    name = "attack.confidence_svc.efficacy"
    assert memorised.figures()[name] < 5
    assert retrained.figures()[name] > 90
    assert abs(retrained.gaps[name]) < 5 < abs(memorised.gaps[name])


def test_over_forgetting_shows_as_an_auc_below_half() -> None:
    """Fails if forget samples that look worse than unseen ones count as well forgotten: the
    Streisand effect."""
    worse = TensorDataset(FORGET.tensors[0], (gold()(FORGET.tensors[0])).argmin(dim=1))
    found = evaluate(gold(), forget=worse, retain=RETAIN, test=TEST).figures()
    assert found["attack.threshold_loss.auc"] < 0.2
    assert found["attack.loss_regression.accuracy"] > 75


def logits(model: nn.Module, data: TensorDataset) -> np.ndarray:
    with torch.no_grad():
        return model(data.tensors[0]).double().numpy()


def log_softmax(z: np.ndarray) -> np.ndarray:
    return (
        z
        - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
        - z.max(1, keepdims=True)
    )


def by_hand(name: str, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A threshold's score by numpy, from stored logits (N, C)."""
    log_p = log_softmax(z)
    p, row = np.exp(log_p), np.arange(len(y))
    if name == "loss":
        return log_p[row, y]
    if name == "confidence":
        return p.max(1)
    if name == "entropy":
        return (p * log_p).sum(1)
    if name == "margin":
        return np.array(
            [zi[yi] - np.log(np.exp(np.delete(zi, yi)).sum()) for zi, yi in zip(z, y, strict=True)]
        )
    assert name == "modified_entropy"
    return np.array(
        [
            (1 - pi[yi]) * np.log(pi[yi])
            + sum(pi[j] * np.log(1 - pi[j]) for j in range(CLASSES) if j != yi)
            for pi, yi in zip(p, y, strict=True)
        ]
    )


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_agree_with_sklearn_and_scipy_on_stored_logits(name: str) -> None:
    """Fails if a feature, the AUC or the TPR at a low FPR is computed in another way."""
    model = gold(14)
    sides = [by_hand(name, logits(model, d), d.tensors[1].numpy()) for d in (FORGET, TEST)]
    truth = np.repeat([1, 0], [len(FORGET), len(TEST)])
    found = evaluate(model, **SETS).attacks[f"threshold_{name}"]
    expected = roc_auc_score(truth, np.concatenate(sides))
    assert found.figures["auc"] == pytest.approx(expected, abs=1e-6)
    rank_sum = mannwhitneyu(*sides).statistic / (len(FORGET) * len(TEST))
    assert found.figures["auc"] == pytest.approx(rank_sum, abs=1e-6)
    false, true, _ = roc_curve(truth, np.concatenate(sides), drop_intermediate=False)
    for figure, rate in (("tpr_at_1_percent_fpr", 0.01), ("tpr_at_0.1_percent_fpr", 0.001)):
        best = 100 * true[false <= rate].max()
        assert found.figures[figure] == pytest.approx(best, abs=1e-6)
    assert found.roc[0] == (0.0, 0.0)
    assert found.roc[-1] == (1.0, 1.0)


def test_confidence_svc_agrees_with_sklearn_on_stored_logits() -> None:
    """Fails if the machine is not the published one, or is fitted on anything but as many retain
    as test samples."""
    model, small = original(), TensorDataset(*(t[:200] for t in TEST.tensors))
    confidence = [
        np.exp(log_softmax(logits(model, d))[np.arange(len(d)), d.tensors[1].numpy()])
        for d in (RETAIN, small, FORGET)
    ]
    members = np.sort(confidence[0])[(np.arange(200) * 2 + 1) * 450 // 400]
    svc = SVC(C=3, gamma="auto", kernel="rbf")
    svc.fit(np.concatenate([members, confidence[1]])[:, None], np.repeat([1, 0], 200))
    expected = 100 * (1 - svc.predict(confidence[2][:, None]).mean())
    found = evaluate(model, forget=FORGET, retain=RETAIN, test=small).attacks["confidence_svc"]
    assert found.figures["efficacy"] == pytest.approx(expected, abs=0.7)


def test_thinned_svc_agrees_with_one_fitted_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a thinned fit is not weighted: the penalty would be that of fewer samples."""
    generator = torch.Generator().manual_seed(0)
    sets = {}
    for name, count, power in (("retain", 3000, 0.1), ("test", 1500, 0.8), ("forget", 800, 0.3)):
        p = torch.rand(count, generator=generator).double() ** power
        z = torch.stack([torch.logit(p, eps=1e-9), torch.zeros_like(p)], 1)
        columns = scores_of(z, torch.zeros(count, dtype=torch.int64)).unbind(1)
        sets[name] = Outputs(columns[0].long(), columns[1].long(), *columns[2:])
    found = {}
    for most in (1500, 150):
        monkeypatch.setattr(attack, "MOST_FITTED", most)
        found[most] = attack.confidence_svc(sets).figures["efficacy"]
    assert 10 < found[1500] < 90
    assert found[150] == pytest.approx(found[1500], abs=0.7)


def test_loss_regression_agrees_with_sklearn_cross_validation() -> None:
    """Fails if the accuracy is of samples that the attacker was fitted on, or is not balanced."""
    generator = np.random.default_rng(4)
    differ = 0
    for _ in range(10):
        loss = [np.sort(generator.gamma(2, scale, n)) for scale, n in ((1.0, 13), (1.6, 21))]
        values, truth = np.concatenate(loss)[:, None], np.repeat([1, 0], [13, 21])
        fold = np.concatenate([np.arange(len(one)) % 5 for one in loss])
        said = np.empty(len(truth))
        for one in range(5):
            fit = LogisticRegression(class_weight="balanced")
            fit.fit(values[fold != one], truth[fold != one])
            said[fold == one] = fit.predict(values[fold == one])
        seen = LogisticRegression(class_weight="balanced").fit(values, truth).predict(values)
        expected, in_sample = (
            50 * ((x == truth)[truth == 1].mean() + (x == truth)[truth == 0].mean())
            for x in (said, seen)
        )
        differ += expected != in_sample
        sets = {
            name: with_loss(torch.from_numpy(x[::-1].copy()))
            for name, x in zip(("forget", "test"), loss, strict=True)
        }
        found = attack.loss_regression(sets).figures["accuracy"]
        assert found == pytest.approx(expected)
    assert differ


def with_loss(loss: Tensor) -> Outputs:
    """Outputs of samples of class 0 with these losses."""
    p = (-loss).exp()
    columns = scores_of(torch.stack([p.log(), (1 - p).log()], 1), torch.zeros(len(p)).long())
    return Outputs(columns[:, 0].long(), columns[:, 1].long(), *columns.unbind(1)[2:])


def test_rmia_score_is_the_share_of_the_population_that_is_dominated() -> None:
    """Fails if the ratio is turned round, or the reference's correction or gamma is left out."""
    g = torch.Generator().manual_seed(0)
    target, out, z, z_out = (torch.rand(n, generator=g).double() for n in (20, 20, 15, 15))

    def expected(i: int) -> float:
        own = target[i] / (0.5 * ((1 + OFFLINE) * out[i] + (1 - OFFLINE)))
        others = [z[j] / (0.5 * ((1 + OFFLINE) * z_out[j] + (1 - OFFLINE))) for j in range(15)]
        return sum(float(own / other > GAMMA) for other in others) / 15

    found = scores(target, out, z, z_out)
    assert found.tolist() == pytest.approx([expected(i) for i in range(20)])
    assert 0 < float(found.mean()) < 1


def test_class_forgetting_is_judged_against_unseen_samples_of_the_class() -> None:
    """Fails if a forgotten class is compared with test samples of all classes: the class alone
    would tell the two apart."""
    members, unseen = (
        Subset(d, (d.tensors[1] == 0).nonzero().flatten().tolist()) for d in (FORGET, TEST)
    )
    by_class = evaluate(gold(), forget=members, retain=RETAIN, test=TEST, forget_test=unseen)
    from_test = evaluate(gold(), forget=members, retain=RETAIN, test=TEST)
    for name in ("loss_regression", "threshold_loss"):
        assert by_class.attacks[name].figures == from_test.attacks[name].figures
    assert "forget_test" in by_class.attacks["threshold_loss"].fitted_on
    others = Subset(TEST, (TEST.tensors[1] != 0).nonzero().flatten().tolist())
    none = evaluate(gold(), forget=members, retain=RETAIN, test=others)
    assert "no test sample is of a class" in none.attacks["loss_regression"].reasons["accuracy"]


def test_too_few_unseen_samples_are_the_reason_for_no_low_rate() -> None:
    """Fails if a TPR at 0.1 % FPR is told of 200 samples, of which none can be 0.1 %."""
    small = TensorDataset(*(t[:200] for t in TEST.tensors))
    found = evaluate(gold(), forget=FORGET, retain=RETAIN, test=small).attacks["threshold_loss"]
    assert "tpr_at_1_percent_fpr" in found.figures
    assert "tpr_at_0.1_percent_fpr" not in found.figures
    assert "1000 non-members" in found.reasons["tpr_at_0.1_percent_fpr"]


def test_every_attack_says_what_it_is_or_why_it_is_not() -> None:
    """Fails if an attack is silent about its feature, fit or direction, or fails without a word."""
    complete = evaluate(gold(), **SETS)
    poor = evaluate(gold(), retain=RETAIN)
    for one in complete.attacks.values():
        assert all((one.feature, one.attacker, one.fitted_on, one.orientation))
        assert one.figures or one.reasons
    assert complete.attacks.keys() == poor.attacks.keys()
    for one in poor.attacks.values():
        assert not one.figures
        assert one.reasons
    assert evaluate(gold(), **SETS, membership=False).attacks == {}


def test_infinite_losses_are_ranked_not_fatal() -> None:
    """Fails if a label of probability 0 ends in NaN or an error of the attack."""

    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, 0.0, -math.inf) + torch.tensor([0.0, 1.0])

    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]).repeat(4, 1)
    data = TensorDataset(x, torch.zeros(12, dtype=torch.int64))
    found = evaluate(Certain(), forget=data, retain=data, test=data)
    assert found.sets["forget"].loss == math.inf
    for name in ("threshold_loss", "threshold_margin", "threshold_modified_entropy"):
        assert found.attacks[name].figures["auc"] == pytest.approx(0.5)
    assert "accuracy" in found.attacks["loss_regression"].figures


def test_one_gold_model_serves_rmia_and_has_no_figure_of_its_own() -> None:
    """Fails if a gold model is its own reference."""
    found = evaluate(network(), **SETS, gold=gold())
    assert "auc" in found.attacks["rmia"].figures
    assert found.gold is not None
    assert "another" in found.gold.attacks["rmia"].reasons["auc"]
