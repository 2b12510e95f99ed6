"""The two-sample test of the forget set against unseen data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import deepclean_hooks as deepclean
from deepclean_hooks.measure.answers import Answers
from deepclean_hooks.metrics.forgetting import compared, forgetting
from deepclean_hooks.stored.bits import differing
from deepclean_hooks.testing import held_out, network, sets


def found(losses: Tensor, labels: Tensor) -> Answers:
    """Answers with these losses; the probability of the own class is what they say."""
    p = torch.zeros(len(losses), 3)
    own = torch.exp(-losses).float()
    p[torch.arange(len(losses)), labels] = own
    p[torch.arange(len(losses)), (labels + 1) % 3] = 1 - own
    return Answers(p, labels, losses.double(), torch.arange(len(losses)))


def drawn(count: int, seed: int, shift: float = 0.0) -> Answers:
    """Samples of three classes, each with its own range of losses."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return found(torch.rand(count, generator=random) + labels + shift, labels)


def test_the_figure_is_that_of_every_pair() -> None:
    """Fails if ties count whole, classes are mixed, or a class does not weigh as D_f has it."""
    forget = found(torch.tensor([0.1, 0.5, 2.0, 0.5]), torch.tensor([0, 0, 1, 0]))
    unseen = found(torch.tensor([0.5, 0.3, 1.0, 3.0, 9.0]), torch.tensor([0, 0, 1, 1, 2]))
    auc = 0.0
    for a, y in zip(forget.losses, forget.labels, strict=True):
        there = unseen.losses[unseen.labels == y]
        auc += float(((a > there) + 0.5 * (a == there)).mean()) / 4
    result = compared(forget, unseen)
    assert result.auc == pytest.approx(auc, rel=1e-12)
    assert result.unseen_loss == pytest.approx(0.75 * 0.4 + 0.25 * 2.0, rel=1e-6)


def test_unseen_samples_pass_in_95_of_100_tests() -> None:
    """Fails if the deviations are not those of the figure: over 400 draws of unseen samples about
    5 in 100 are called remembered, and their deviations have variance 1."""
    results = [compared(drawn(50, 2 * seed), drawn(300, 2 * seed + 1)) for seed in range(400)]
    called = sum(not result.forgotten for result in results) / len(results)
    spread = torch.tensor([result.deviations for result in results]).std()
    assert 0.02 < called < 0.09
    assert 0.85 < float(spread) < 1.15


def test_remembered_samples_are_told_and_unfamiliar_ones_are_not() -> None:
    """Fails if the test is turned round."""
    unseen = drawn(300, seed=0)
    remembered, unfamiliar = (compared(drawn(50, 1, shift), unseen) for shift in (-0.4, 0.4))
    assert not remembered.forgotten
    assert remembered.auc < 0.5
    assert unfamiliar.forgotten
    assert unfamiliar.auc > 0.5
    assert "still told from unseen data" in str(remembered)
    assert "met as unseen data" in str(unfamiliar)


def test_a_class_without_unseen_samples_is_named() -> None:
    """Fails if another class's losses stand in for it."""
    unseen = drawn(300, seed=0)
    lacking = found(unseen.losses[unseen.labels != 1], unseen.labels[unseen.labels != 1])
    with pytest.raises(ValueError, match="held_out has no sample of class 1"):
        compared(drawn(50, seed=1), lacking)


def test_a_run_can_be_asked_and_is_left_alone() -> None:
    """Fails if asking moves a bit of the model, or answers of another set."""
    model = network()
    forget, retain = sets()
    with deepclean.unlearning(
        model,
        forget=forget,
        retain=retain,
        method=deepclean.FineTune(),
        scores=False,
        progress=False,
    ) as run:
        then = {name: t.clone() for name, t in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        result = run.forgotten(held_out())
        assert result == forgetting(model, forget, held_out())
        for name, tensor in model.state_dict().items():
            assert not differing(tensor, then[name]).any()
        assert modes == [module.training for module in model.modules()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.nn.functional.cross_entropy(model(retain.tensors[0]), retain.tensors[1]).backward()
        optimizer.step()
