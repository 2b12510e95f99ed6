"""Defects of published evaluation code, each named, and that ours does not have it.

N: samples, C: classes.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from deepclean_hooks.metrics import distance
from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.metrics.outputs import Outputs, scores_of
from deepclean_hooks.metrics.pools import klom, ulira
from lab.planted import CLASSES, FORGET, RETAIN, SETS, TEST, gold, joined, original


def outputs(logits: Tensor, labels: Tensor) -> Outputs:
    columns = scores_of(logits, labels).unbind(1)
    return Outputs(columns[0].long(), columns[1].long(), *columns[2:])


LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double() * 3
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def test_modified_entropy_reads_each_row_at_its_own_label() -> None:
    """Unlearn-Sparse and SalUn index `[:, labels]`: every row at every label. Fails if a sample's
    figure changes with the labels of the others."""
    alone = [
        float(outputs(LOGITS[i : i + 1], LABELS[i : i + 1]).modified_entropy) for i in range(6)
    ]
    assert outputs(LOGITS, LABELS).modified_entropy.tolist() == pytest.approx(alone)
    changed = LABELS.clone()
    changed[1:] = 3
    assert float(outputs(LOGITS, changed).modified_entropy[0]) == pytest.approx(alone[0])


def test_modified_entropy_takes_the_logarithm_of_one_minus_p() -> None:
    """Unlearn-Sparse and SalUn take log p where Song and Mittal have log(1 - p). Fails if a sample
    whose wrong class is certain is not the worst of all."""
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    expected = -(0.3 * math.log(0.7) + 0.2 * math.log(0.8) + 0.1 * math.log(0.9))
    assert float(outputs(p.log(), torch.tensor([0])).modified_entropy) == pytest.approx(expected)
    sure = torch.tensor([[20.0, 0.0], [0.0, 20.0], [0.0, 0.0]])
    right, wrong, unsure = outputs(sure, torch.tensor([0, 0, 0])).modified_entropy.tolist()
    assert right < unsure < wrong


def test_divergence_is_summed_over_the_classes() -> None:
    """SSD's ZRF and bad-teaching's loss use kl_div's "mean", which divides by C as well. Fails if
    the divergence of the same two outputs shrinks when classes that never occur are added."""
    one, other = LOGITS, LOGITS.flip(1)
    found = distance.js_divergence(one, other)
    never = torch.full((6, 96), -1e4, dtype=torch.float64)
    padded = distance.js_divergence(torch.cat([one, never], 1), torch.cat([other, never], 1))
    assert padded.tolist() == pytest.approx(found.tolist())
    middle = ((one.softmax(1) + other.softmax(1)) / 2).log()
    terms = [F.kl_div(middle, x.softmax(1), reduction="none") for x in (one, other)]
    divided = float(torch.stack(terms).mean())  # what reduction="mean" gives
    assert float(found.mean()) == pytest.approx(4 * divided / math.log(2))


def test_zrf_is_a_divergence_and_no_cosine() -> None:
    """torchunlearn's "ZRF" is a cosine similarity, which does not see how certain outputs are.
    Fails if logits scaled by a factor come out as equal."""
    assert distance.zrf(LOGITS, 3 * LOGITS, "").value < 0.99


def test_accuracy_is_a_mean_over_samples() -> None:
    """SSD's and others' accuracies are means of batch means. Fails if the last, short batch weighs
    as much as the others."""
    mixed = TensorDataset(*(t[[0, 1, 2, 450, 451, 452, 453]] for t in joined(RETAIN, TEST).tensors))
    with torch.no_grad():
        right = gold()(mixed.tensors[0]).argmax(1) == mixed.tensors[1]
    assert 3 <= int(right.sum()) < 7
    for size in (1, 3, 7):
        found = evaluate(gold(), test=DataLoader(mixed, batch_size=size)).sets["test"]
        assert found.accuracy == pytest.approx(100 * int(right.sum()) / 7)


def test_non_members_are_never_training_samples() -> None:
    """erasus takes retain training data for non-members. Fails if an attack that needs non-members
    is told without test data."""
    found = evaluate(original(), forget=FORGET, retain=RETAIN)
    assert found.attacks
    assert all(not attack.figures for attack in found.attacks.values())


def test_attacks_fit_with_the_installed_scikit_learn() -> None:
    """SSD and SUPREME pass `multi_class=`, which scikit-learn no longer has; torchunlearn swallows
    the exception. Fails if an attack has no figure and the library is there."""
    found = evaluate(original(), **SETS)
    missing = {name for name, attack in found.attacks.items() if not attack.figures}
    assert missing == {"rmia"}
    assert "gold" in found.attacks["rmia"].reasons["auc"]


def test_class_attack_is_not_fitted_on_forget_training_samples_as_non_members() -> None:
    """Kodge's attack fits retain-train against forget-train and so learns the class. Fails if the
    confidence attack's figure of a retrained model is 100 by construction: forget must be scored
    by a machine that never saw it."""
    fitted_on = evaluate(gold(), **SETS).attacks["confidence_svc"].fitted_on
    assert "forget" not in fitted_on
    assert "retain" in fitted_on
    assert "test" in fitted_on


def test_klom_keeps_the_largest_margin_and_the_order_of_its_arguments() -> None:
    """dub's eval.py passes oracle and unlearned in swapped order, and digitize drops the maximum.
    Fails if the unlearned models' mass in a bin that no retrained one reaches costs little."""
    retrained = torch.zeros(20, 1)
    unlearned = torch.zeros(20, 1)
    unlearned[:10] = 1.0  # the maximum
    found = klom(unlearned, retrained)
    assert found.mean == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-5), rel=1e-2)
    assert klom(retrained, unlearned).mean == pytest.approx(math.log(2), rel=1e-2)


def test_ulira_looks_at_unlearned_models() -> None:
    """Kodge's U-LiRA helper evaluates the inference model, not the unlearned one; deepunlearn fits
    on correctness. Fails if margins that differ while all predictions agree are not told apart."""
    g = torch.Generator().manual_seed(0)
    unlearned = 9 + torch.randn(6, 100, generator=g)
    retrained = 3 + 0.5 * torch.randn(6, 100, generator=g)
    assert bool((unlearned > 0).all() and (retrained > 0).all())
    assert ulira(unlearned, retrained).figures["accuracy"] > 95


def test_test_set_is_not_the_training_set() -> None:
    """SSD's Pins loader has test equal to train. Fails if sets that are one and the same are told
    apart: then AUC is not 0.5."""
    found = evaluate(original(), forget=FORGET, retain=RETAIN, test=FORGET).figures()
    assert found["attack.threshold_loss.auc"] == pytest.approx(0.5)


def test_attacks_do_not_depend_on_chance() -> None:
    """SCRUB's and the NeurIPS kit's attacks draw random splits. Fails if a figure changes from call
    to call, or with the state of a random generator."""
    torch.manual_seed(1)
    first = evaluate(gold(), **SETS).figures()
    torch.manual_seed(2)
    assert evaluate(gold(), **SETS).figures() == first
    assert "seed" not in inspect.signature(evaluate).parameters
    assert len(TEST) > CLASSES
