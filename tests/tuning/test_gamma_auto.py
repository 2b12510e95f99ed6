"""gamma="auto": a stated rule, read from trials on copies, without test data."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.stored import bits
from deepclean_hooks.tuning.choice import BUDGET, Behaviour, GammaTrial, verdict
from deepclean_hooks.tuning.gamma_auto import choose_gamma
from lab.planted import FORGET, RETAIN, SETS, drawn, original
from lab.processes import launch

HELD_OUT = drawn(600, 4)
CLASSES = 4


def blobs(count: int, seed: int) -> TensorDataset:
    """Four classes around four points: an unseen one is never predicted."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = 3 * torch.eye(CLASSES).repeat(1, 3)[y]
    return TensorDataset(x + torch.randn(count, 12, generator=generator), y)


def of_class(data: TensorDataset, label: int, keep: bool) -> TensorDataset:
    """The samples of the class, or all others."""
    mask = (data.tensors[1] == label) == keep
    return TensorDataset(*(one[mask] for one in data.tensors))


def blob_model() -> nn.Module:
    """With BatchNorm and dropout, whose statistics and random numbers a trial must not touch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, CLASSES)
    )
    data = blobs(200, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


ORIGINAL = Behaviour(
    90.0, forget_accuracy=99.0, forget_loss=0.1, held_out_accuracy=80.0, held_out_loss=0.5
)


def tried(gamma: float, retain: float = 90.0, **figures: float) -> GammaTrial:
    """A trial of a model with ten classes."""
    found = Behaviour(retain, **figures)
    return GammaTrial(gamma, 10, found, found.distance(ORIGINAL), found.as_unseen(10))


def seen(accuracy: float, loss: float, held_out: float = 80.0) -> dict[str, float]:
    """Forget samples beside held-out ones of loss 0.5, give or take 2 points and 0.05 nats."""
    return {
        "forget_accuracy": accuracy,
        "forget_loss": loss,
        "held_out_accuracy": held_out,
        "held_out_loss": 0.5,
        "accuracy_error": 2.0,
        "loss_error": 0.05,
    }


def test_the_rule_takes_what_is_closest_to_a_retrained_model() -> None:
    """Fails if forgetting, what is kept or what generalises is left out of the distance, if the
    smaller of equal gammas is taken, or one that costs more retain accuracy than the budget."""
    table = [
        tried(1.0, retain=78.0, **seen(80.0, 0.5)),  # forgets, beyond the budget: 4
        tried(1.5, retain=84.0, **seen(76.0, 0.5, held_out=75.0)),  # 5
        tried(2.0, retain=87.0, **seen(83.0, 0.5)),  # 2
        tried(3.0, retain=90.0, **seen(86.0, 0.4)),  # 2
        tried(5.0, retain=90.0, **seen(95.0, 0.2)),  # 5
    ]
    assert [one.distance for one in table] == pytest.approx([4, 5, 2, 2, 5])
    position, reason = verdict(table, ORIGINAL)
    assert table[position].gamma == 3.0
    assert "still better known" in reason
    assert "still" not in verdict(table[:2], ORIGINAL)[1]
    assert verdict(table[:2], ORIGINAL)[0] == 1
    position, reason = verdict(table[:1], ORIGINAL)
    assert position == 0
    assert "every gamma of the grid cost more than 10 points" in reason


def test_a_class_that_is_not_kept_must_not_be_predicted() -> None:
    """Fails if a new class is compared with held-out data, or if chance passes for forgotten."""
    never, chance = tried(1.0, new_class_accuracy=0.0), tried(2.0, new_class_accuracy=10.0)
    assert verdict([never, chance], ORIGINAL)[0] == 0
    assert (never.as_unseen, chance.as_unseen) == (True, False)
    assert not tried(1.0, new_class_accuracy=0.0, **seen(83.0, 0.5)).as_unseen
    assert not tried(1.0, new_class_accuracy=0.0, **seen(80.0, 0.4)).as_unseen
    assert tried(1.0, new_class_accuracy=0.0, **seen(82.0, 0.45)).as_unseen


def test_a_class_is_forgotten_and_the_trial_says_so() -> None:
    """Fails if the choice needs held-out data for a class, if the model moves in any bit, or if the
    chosen gamma does not do what its trial said."""
    model, data = blob_model(), blobs(200, 0)
    forget, retain = of_class(data, 0, True), of_class(data, 0, False)
    model.train()
    before = bits.digest(dict(model.named_parameters()) | dict(model.named_buffers()))
    states = torch.get_rng_state(), random.getstate()
    choice = choose_gamma(model, forget, retain, progress=False)
    after = bits.digest(dict(model.named_parameters()) | dict(model.named_buffers()))
    assert after == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(p.grad is None for p in model.parameters())
    deepclean.Session(model, deepclean.DeepClean())  # refused while a guard holds the model
    assert choice.original.new_class_accuracy == 100
    assert choice.met
    chosen = next(one for one in choice.trials if one.gamma == choice.gamma)
    assert chosen.behaviour.new_class_accuracy <= 50 / CLASSES
    assert all(one.distance > chosen.distance for one in choice.trials if one.gamma > choice.gamma)
    assert json.loads(json.dumps(choice.to_dict())) == choice.to_dict()
    assert f"gamma {choice.gamma:g}" in str(choice)


@pytest.mark.filterwarnings("ignore:.*of the reset entries are dead")
def test_a_session_takes_the_gamma_that_choose_gamma_gives() -> None:
    """Fails if a session selects by another gamma, keeps no account of the choice, cannot be stored
    and taken up again, or measures the data again."""
    data = blobs(200, 0)
    forget, retain = of_class(data, 0, True), of_class(data, 0, False)
    expected = choose_gamma(blob_model(), forget, retain, progress=False)
    model = blob_model()
    run = deepclean.Session(model, deepclean.DeepClean(gamma="auto"), scores=False)
    preview = run.measure(forget, retain).select()
    fixed = deepclean.Session(blob_model(), expected.method, scores=False)
    fixed.measure(forget, retain).select()
    assert preview.settings["gamma"] == expected.gamma
    assert preview.gamma_choice == expected.to_dict()
    assert preview.selected_entries == fixed.report.selected_entries
    assert "choose gamma" in preview.seconds
    state = run.reset().state_dict()
    again = deepclean.Session(model, deepclean.DeepClean(gamma="auto"), scores=False)
    assert again.load_state_dict(state).report.settings["gamma"] == expected.gamma


def test_random_samples_need_data_that_were_not_trained_on() -> None:
    """Fails if random samples are judged without held-out data, or if the error comes after the
    Fisher pass."""
    run = deepclean.Session(original(), deepclean.DeepClean(gamma="auto"), scores=False)
    with pytest.raises(ValueError, match=r'DeepClean\(gamma="auto", held_out=validation\)'):
        run.measure(FORGET, RETAIN)
    assert "fisher" not in run.report.seconds
    lacking = of_class(HELD_OUT, 3, False)
    with pytest.raises(ValueError, match=r"no sample of the forgotten classes \[3\]"):
        choose_gamma(original(), FORGET, RETAIN, held_out=lacking)


def test_where_no_gamma_forgets_the_report_and_a_warning_say_so() -> None:
    """Fails if labels learned by heart, which no generalisation replaces, pass for forgotten."""
    method = deepclean.DeepClean(gamma="auto", held_out=HELD_OUT)
    run = deepclean.Session(original(), method, scores=False).measure(FORGET, RETAIN)
    with pytest.warns(UserWarning, match="still better known than unseen data"):
        told = run.select().gamma_choice
    assert told["original"]["forget_accuracy"] == 100
    assert told["original"]["held_out_accuracy"] < 30
    assert not told["met"]
    rising = [one["behaviour"]["forget_loss"] for one in reversed(told["trials"])]
    assert rising == sorted(rising)
    least = told["original"]["retain_accuracy"] - BUDGET
    kept = [one for one in told["trials"] if one["behaviour"]["retain_accuracy"] >= least]
    assert told["gamma"] == min(kept, key=lambda one: one["distance"])["gamma"]
    assert any("still better known" in one for one in run.report.warnings)


def test_samples_that_were_never_trained_on_are_met_as_unseen_ones() -> None:
    """Fails if forget samples are held to another bar than held-out ones: these are both new to
    the model, so that the smallest selection will do."""
    held_out, retain = blobs(200, 9), blobs(200, 0)
    choice = choose_gamma(blob_model(), blobs(40, 5), retain, held_out=held_out, progress=False)
    assert choice.original.as_unseen(CLASSES)
    assert choice.met
    assert choice.gamma == 10


def test_test_data_have_no_say() -> None:
    """Fails if the test set, whatever its labels, changes the choice."""
    data, other = blobs(200, 0), blobs(80, 7)
    forget, retain = of_class(data, 0, True), of_class(data, 0, False)
    wrong = TensorDataset(other.tensors[0], other.tensors[1].flip(0))
    told = []
    for test in (other, wrong):
        run = deepclean.Session(blob_model(), deepclean.DeepClean(gamma="auto"), test=test)
        told.append(run.measure(forget, retain).select().gamma_choice)
    assert told[0] == told[1]


def test_what_auto_cannot_serve_is_refused() -> None:
    """Fails if a stored measurement, data without labels or an unused held-out set pass in
    silence."""
    model, data = blob_model(), blobs(200, 0)
    forget, retain = of_class(data, 0, True), of_class(data, 0, False)
    auto = deepclean.DeepClean(gamma="auto")
    stored = deepclean.fisher_diagonal(model, retain, progress=False)
    with pytest.raises(ValueError, match="pass the retain set"):
        deepclean.Session(model, auto).measure(forget, stored)
    with pytest.raises(ValueError, match=r"choose_gamma\(model, forget, retain\)"):
        auto.select(stored, stored)
    with pytest.raises(ValueError, match="held_out serves to choose gamma"):
        deepclean.DeepClean(gamma=2.0, held_out=SETS["test"])
    soft = TensorDataset(data.tensors[0], nn.functional.one_hot(data.tensors[1]).float())
    with pytest.raises(TypeError, match="class labels"):
        choose_gamma(model, soft, retain)


def test_the_loader_of_the_retain_set_does_not_matter() -> None:
    """Fails if the slice that trials train on depends on how the loader batches or shuffles."""
    data = blobs(200, 0)
    forget, retain = of_class(data, 0, True), of_class(data, 0, False)
    tables = [
        choose_gamma(blob_model(), forget, loader, progress=False, gammas=(1.0, 3.0)).trials
        for loader in (retain, DataLoader(retain, batch_size=7, shuffle=True, drop_last=True))
    ]
    for one, other in zip(*tables, strict=True):
        assert one.selected_entries == other.selected_entries
        assert vars(one.behaviour) == pytest.approx(vars(other.behaviour))


def chosen() -> dict[str, Any]:
    """What the process it is called in chooses for a class; sets of odd sizes."""
    data = blobs(199, 0)
    forget, retain = of_class(data, 0, True), of_class(data, 0, False)
    return choose_gamma(blob_model(), forget, retain, gammas=(1.0, 3.0), progress=False).to_dict()


@pytest.mark.slow
def test_two_processes_choose_what_one_does() -> None:
    """Fails if each process trains its trial on its own share, judges by that alone, or one waits
    for the other."""
    code = (
        "import json, torch.distributed as dist; from tuning.test_gamma_auto import chosen\n"
        "dist.init_process_group('gloo'); print(json.dumps(chosen()))"
    )
    told, expected = [json.loads(out) for out in launch("-c", code)], chosen()
    assert told[0] == told[1]
    assert told[0]["gamma"] == expected["gamma"]
    for one, other in zip(told[0]["trials"], expected["trials"], strict=True):
        assert one["selected_entries"] == other["selected_entries"]
        assert one["distance"] == pytest.approx(other["distance"], abs=1e-3)
