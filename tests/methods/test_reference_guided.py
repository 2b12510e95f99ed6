"""Reference-guided unlearning: its targets, its term, and what may train beside it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.data.losses import cross_entropy
from deepclean_hooks.methods.adding import positions
from deepclean_hooks.stored.bits import differing
from deepclean_hooks.testing import network

pytestmark = pytest.mark.filterwarnings("ignore:.* of the reset entries are dead:UserWarning")
OPTIONS: dict[str, Any] = {"scores": False, "progress": False, "batch_size": 8}


def part(seed: int, count: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Samples of four classes."""
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    x = torch.randn(count, 1, 6, 6, generator=random, dtype=torch.float64) + y[:, None, None, None]
    return TensorDataset(x.to(dtype), y)


FORGET, RETAIN, HELD_OUT = part(1, 13), part(2, 40), part(3, 22)


def targets(method: deepclean.ReferenceGuided, model: nn.Module) -> dict[str, Tensor]:
    run = deepclean.Session(model, method, **OPTIONS).measure(FORGET, RETAIN)
    run.select()
    run.reset()
    return run._reset().term.state_dict()


def test_ranks_are_paired_at_equal_quantiles_of_each_class() -> None:
    """Fails if a target is of another class, the order is turned round, or quantiles are not
    equal: the naive way, one sample at a time."""
    model = network()
    (found,) = targets(deepclean.ReferenceGuided(HELD_OUT), model).values()
    model.eval()
    for i, (x, y) in enumerate(FORGET):
        gone = [loss(model, *s) for s in FORGET if s[1] == y]
        rank = sorted(gone).index(loss(model, x, y))
        there = sorted((loss(model, *s), s[0]) for s in HELD_OUT if s[1] == y)
        at = there[int((rank + 0.5) / len(gone) * len(there))]
        torch.testing.assert_close(found[i], model(at[1][None]).softmax(1)[0].detach())


def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return F.cross_entropy(model(x[None]), y[None]).item()


@pytest.mark.parametrize("match", ["rank", "mean"])
def test_the_term_is_what_a_loop_by_hand_would_add(match: str) -> None:
    """Fails if the divergence is turned round, not weighted, not the mean over the batch, in train
    mode, of other batches, or if the mean is not in the proportions of the batch's classes."""
    sets = [part(seed, count, torch.float64) for seed, count in ((1, 13), (2, 40), (3, 22))]
    method = deepclean.ReferenceGuided(sets[2], match, weight=0.7, seed=3)
    mine, theirs = network(torch.float64), network(torch.float64)
    original = copy.deepcopy(theirs).eval()
    steps = 5
    with deepclean.unlearning(
        mine, forget=sets[0], retain=sets[1], method=method, **OPTIONS
    ) as run:
        train(mine, sets[1], steps)
        of_sample = run._reset().term.state_dict().get("of_sample")
    held = original(sets[2].tensors[0]).softmax(1).detach()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    order = positions(13, 8, seed=3)
    for step in range(steps):
        theirs.train()
        x, y = (t[8 * step : 8 * step + 8] for t in sets[1].tensors)
        F.cross_entropy(theirs(x), y).backward()
        at = next(order)
        x, y = (t[at] for t in sets[0].tensors)
        log_p = theirs.eval()(x).log_softmax(1)
        if match == "rank":
            target = of_sample[at]
        else:
            labels = sets[2].tensors[1]
            means = torch.stack([held[labels == label].mean(0) for label in range(4)])
            target = means[y].mean(0).expand(len(at), 4)
        term = 0.7 * (target * (target.log() - log_p)).sum(1).mean()
        term.backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


def train(model: nn.Module, retain: TensorDataset, steps: int, start: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(start, start + steps):
        model.train()
        x, y = (t[8 * step : 8 * step + 8] for t in retain.tensors)
        cross_entropy(model, (x, y)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_three_questions_are_answered_apart() -> None:
    """Fails if `train` does not hold the other entries, or writes although nothing is to be reset,
    or `reset` does not write 0."""
    select = deepclean.DeepClean(gamma=1.1)
    for reset in (False, True):
        model, original = network(), network()
        method = deepclean.ReferenceGuided(HELD_OUT, train=select, reset=reset)
        run = deepclean.Session(model, method, **OPTIONS).measure(FORGET, RETAIN)
        report = run.select()
        masks = run.selection.masks
        run.reset()
        assert 0 < report.selected_entries < report.trainable_entries
        assert report.effect == ("reset to 0" if reset else "left as they were, to be trained")
        for name, p in model.named_parameters():
            mask = masks.get(name, torch.zeros(p.shape, dtype=torch.bool))
            if reset:
                assert (p[mask] == 0).all()
            stays = ~mask if reset else torch.ones_like(mask)
            assert not differing(p, original.get_parameter(name))[stays].any()
        run.guard()
        then = copy.deepcopy(model)
        train(model, RETAIN, 3)
        assert run.finish().frozen_entries_moved == 0
        moved = {n: differing(p, then.get_parameter(n)) for n, p in model.named_parameters()}
        for name, where in moved.items():
            mask = masks.get(name, torch.zeros(where.shape, dtype=torch.bool))
            assert not (where & ~mask).any(), name
        assert sum(int(where.sum()) for where in moved.values()) > 0


def test_forgotten_samples_come_to_the_answers_of_unseen_ones() -> None:
    """Fails if training by the term does not bring the answers on D_f to those of held-out data, on
    a network that has learned D_f by heart: the plain loss leaves them apart."""
    model = network()
    x, y = (torch.cat([FORGET.tensors[i], RETAIN.tensors[i]]) for i in range(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    method = deepclean.ReferenceGuided(HELD_OUT, weight=2.0)
    (target,) = targets(method, copy.deepcopy(model)).values()

    def divergence(net: nn.Module) -> float:
        log_p = net.eval()(FORGET.tensors[0]).log_softmax(1).detach()
        return F.kl_div(log_p, target, reduction="batchmean").item()

    then, ends = divergence(model), {}
    for each in (method, deepclean.FineTune()):
        net = copy.deepcopy(model)
        sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
        deepclean.unlearn(net, FORGET, RETAIN, method=each, steps=120, optimizer=sgd, **OPTIONS)
        ends[each.name] = divergence(net)
    assert ends["reference-guided"] < 0.5 * min(then, ends["fine-tune"])


def test_a_resumed_run_goes_on_in_the_same_bits() -> None:
    """Fails if the targets are computed anew from the model that is half trained, or the forget
    batches begin again with the first."""
    method = deepclean.ReferenceGuided(HELD_OUT, train=deepclean.DeepClean(gamma=1.1))
    sets: dict[str, Any] = {"forget": FORGET, "retain": RETAIN, "method": method}
    whole, first, second = network(), network(), network()
    with deepclean.unlearning(whole, **sets, **OPTIONS):
        plain(whole, 0, 2)
        plain(whole, 2, 3)
    with deepclean.unlearning(first, **sets, **OPTIONS) as run:
        plain(first, 0, 2)
        stored = copy.deepcopy((first.state_dict(), run.state_dict()))
    second.load_state_dict(stored[0])
    with deepclean.unlearning(second, **sets, **OPTIONS, resume=stored[1]):
        plain(second, 2, 3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def plain(model: nn.Module, start: int, steps: int) -> None:
    """Steps of an optimizer without memory."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(start, start + steps):
        x, y = (t[8 * (step % 5) : 8 * (step % 5) + 8] for t in RETAIN.tensors)
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "class"}, 'match must be "rank" or "mean", got \'class\''),
        ({"weight": 0}, "weight must be a positive number, got 0"),
        ({"reset": True}, "reset=True writes what `train` selects, and there is no `train`"),
        ({"train": deepclean.SCRUB()}, r"train=SCRUB\(...\) has an objective of its own"),
        ({"train": deepclean.ReferenceGuided(HELD_OUT)}, "has an objective of its own"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    """Fails if a setting that means nothing is taken."""
    with pytest.raises(ValueError, match=message):
        deepclean.ReferenceGuided(HELD_OUT, **options)


def test_held_out_data_that_cannot_serve_are_refused_before_anything_changes() -> None:
    """Fails if a class without held-out samples, or held-out samples that the model was trained
    on, are found after the model has changed, or never."""
    lacking = Subset(HELD_OUT, [i for i in range(22) if i % 4 in (0, 2)])
    both = zip(HELD_OUT.tensors, RETAIN.tensors, strict=True)
    known = TensorDataset(*(torch.cat([unseen, seen[:3]]) for unseen, seen in both))
    for held_out, message in (
        (lacking, "held_out has no sample of 2 of the forget set's classes, 1, 3"),
        (known, "3 of the 25 samples of held_out stand in the forget or the retain set"),
    ):
        model, original = network(), network()
        method = deepclean.ReferenceGuided(
            held_out, train=deepclean.DeepClean(gamma=1.1), reset=True
        )
        run = deepclean.Session(model, method, **OPTIONS).measure(FORGET, RETAIN)
        run.select()
        with pytest.raises(ValueError, match=message):
            run.reset()
        for name, tensor in original.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
