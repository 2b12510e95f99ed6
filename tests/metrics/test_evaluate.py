"""Evaluation against scikit-learn and numpy on stored logits, and the properties of membership
inference.

N: samples, C: classes.
"""

from __future__ import annotations

import builtins
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.metrics.evaluation import Evaluation
from deepclean_hooks.stored import bits
from lab.processes import on_two_ranks

CLASSES = 5


RATE = "attack.entropy_regression.rate"


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6 * 4, CLASSES),
    )


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 4, 4, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


def stored_logits(model: nn.Module, data: TensorDataset) -> np.ndarray:
    """The logits (N, C) in float64, in one batch of float32."""
    model.eval()
    with torch.no_grad():
        logits = model(data.tensors[0]).double().numpy()
    model.train()
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def test_accuracy_and_loss_agree_with_sklearn_on_uneven_batches() -> None:
    """Fails if figures are means of batch means: 7 samples in batches of 3, 3 and 1."""
    model, data = classifier(), samples(7, seed=1)
    logits, labels = stored_logits(model, data), data.tensors[1].numpy()
    found = evaluate(model, test=DataLoader(data, batch_size=3)).sets["test"]
    assert found.count == 7
    assert found.accuracy == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)))
    expected = log_loss(labels, softmax(logits), labels=range(CLASSES))
    assert found.loss == pytest.approx(expected, rel=1e-6)


def test_per_class_figures_agree_with_numpy() -> None:
    """Fails if a class is divided by the size of the set, or a class that does not occur is
    listed."""
    model, data = classifier(), samples(40, seed=2)
    keep = (data.tensors[1] != 3).nonzero().flatten().tolist()
    logits, labels = stored_logits(model, data)[keep], data.tensors[1].numpy()[keep]
    found = evaluate(model, test=Subset(data, keep), batch_size=7).sets["test"].per_class
    assert list(found) == [0, 1, 2, 4]
    for label, one in found.items():
        rows = logits[labels == label]
        assert one.count == len(rows)
        assert one.accuracy == pytest.approx(100 * (rows.argmax(1) == label).mean())
        assert one.loss == pytest.approx(-np.log(softmax(rows)[:, label]).mean(), rel=1e-6)


def test_shuffle_drop_last_and_batch_size_change_nothing() -> None:
    """Fails if a loader's own order is walked: drop_last would leave 2 of 23 samples out."""
    model, data = classifier(), samples(23, seed=3)
    plain = evaluate(model, forget=data, retain=samples(30, 4), test=samples(31, 5), batch_size=23)
    for size in (1, 7):
        loader = DataLoader(data, batch_size=size, shuffle=True, drop_last=True)
        other = evaluate(model, forget=loader, retain=samples(30, 4), test=samples(31, 5))
        assert other.sets["forget"].count == 23
        assert other.figures() == pytest.approx(plain.figures(), rel=1e-5)


def test_permuted_samples_give_the_same_figures() -> None:
    """Fails if a figure depends on which sample comes first."""
    model, data = classifier(), samples(23, seed=3)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0)).tolist()
    sets = {"retain": samples(30, 4), "test": samples(31, 5)}
    plain = evaluate(model, forget=data, **sets).figures()
    assert evaluate(model, forget=Subset(data, order), **sets).figures() == pytest.approx(plain)


class Mapped(Dataset[dict[str, Tensor]]):
    """The samples as Hugging Face data sets give them."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.data[index]
        return {"pixel_values": x, "labels": y}


class WithOutput(nn.Module):
    """A model in the form of Hugging Face: keyword input, an output with `logits`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(pixel_values)}


def test_mapping_batches_give_the_same_figures() -> None:
    """Fails if batches that are mappings are read differently from (x, y)."""
    model, data = classifier(), samples(11, seed=6)
    plain = evaluate(model, test=data, batch_size=4)
    mapped = evaluate(WithOutput(model), test=DataLoader(Mapped(data), batch_size=4))
    assert mapped.figures() == plain.figures()


class Memoriser(nn.Module):
    """Certain of the samples it has seen, near to guessing on all others: scores by table."""

    def __init__(self, seen: TensorDataset) -> None:
        super().__init__()
        self.keys = nn.Parameter(seen.tensors[0].flatten(1))
        self.labels = seen.tensors[1]
        self.noise = nn.Linear(self.keys.shape[1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        known = (flat.unsqueeze(1) == self.keys).all(dim=2)  # (N, seen)
        votes = nn.functional.one_hot(self.labels, CLASSES).float()
        return self.noise(flat) + 20 * (known.float() @ votes)


def joined(*parts: TensorDataset) -> TensorDataset:
    return TensorDataset(*(torch.cat([p.tensors[i] for p in parts]) for i in range(2)))


def test_attacker_finds_a_memorised_forget_set_and_no_unseen_one() -> None:
    """Fails if the orientation is turned round, or members and non-members are swapped in the
    fit."""
    torch.manual_seed(0)
    forget, retain, test = samples(80, 7), samples(300, 8), samples(200, 9)
    unseen = samples(200, 10)
    remembers = evaluate(Memoriser(joined(forget, retain)), forget=forget, retain=retain, test=test)
    figures = remembers.attacks["entropy_regression"].figures
    assert figures["rate"] == 100
    assert figures["attacker_accuracy"] > 95

    never_saw = Memoriser(retain)
    unseen_rate, test_rate = (
        evaluate(never_saw, forget=data, retain=retain, test=test).figures()[RATE]
        for data in (unseen, test)
    )
    assert unseen_rate == pytest.approx(test_rate, abs=5)
    assert unseen_rate < 10


def test_membership_agrees_with_sklearn_on_stored_logits() -> None:
    """Fails if the feature is not the entropy, the classes are not balanced, or the scale is
    changed."""
    model = classifier()
    sets = {"forget": samples(50, 11), "retain": samples(90, 12), "test": samples(40, 13)}
    p = {name: softmax(stored_logits(model, data)) for name, data in sets.items()}
    entropy = {name: -(q * np.log(q)).sum(axis=1, keepdims=True) for name, q in p.items()}
    attacker = LogisticRegression(class_weight="balanced")
    attacker.fit(np.vstack([entropy["retain"], entropy["test"]]), np.repeat([1, 0], [90, 40]))
    found = evaluate(model, **sets, batch_size=16).attacks["entropy_regression"]
    rate = found.figures["rate"]
    assert rate == pytest.approx(100 * attacker.predict(entropy["forget"]).mean())
    assert 0 < rate < 100
    for words in (found.feature, found.attacker, found.fitted_on, found.orientation):
        assert words
    assert "entropy" in found.feature


@pytest.mark.parametrize("missing", ["forget", "retain", "test"])
def test_missing_set_is_the_reason_for_no_membership(missing: str) -> None:
    """Fails if membership inference is left out without a word."""
    sets = {"forget": samples(9, 1), "retain": samples(9, 2), "test": samples(9, 3)}
    del sets[missing]
    found = evaluate(classifier(), **sets)
    attack = found.attacks["entropy_regression"]
    assert not attack.figures
    assert missing in attack.reasons["rate"]
    assert attack.reasons["rate"] in str(found)


def test_missing_scikit_learn_is_the_reason_for_no_membership(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a missing library ends in an exception, or in silence."""
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    found = evaluate(classifier(), forget=samples(9, 1), retain=samples(9, 2), test=samples(9, 3))
    attack = found.attacks["entropy_regression"]
    assert not attack.figures
    assert "deepclean-hooks[evaluate]" in attack.reasons["rate"]
    assert found.sets["forget"].count == 9


def test_membership_that_was_not_asked_for_says_so() -> None:
    """Fails if leaving it out looks like a failure."""
    found = evaluate(classifier(), test=samples(9, 1), membership=False)
    assert "not asked for (membership=False)" in str(found)


def test_gaps_are_this_minus_gold_for_every_figure() -> None:
    """Fails if a gap is turned round, or a figure has none."""
    sets = {"forget": samples(20, 1), "retain": samples(30, 2), "test": samples(25, 3)}
    model, gold = classifier(0), classifier(1)
    alone, reference = evaluate(model, **sets), evaluate(gold, **sets)
    for given in (gold, reference, [gold]):
        found = evaluate(model, **sets, gold=given)
        # RMIA needs reference models, and the gold model is the only one.
        own = {n: v for n, v in found.figures().items() if not n.startswith("attack.rmia")}
        assert own == alone.figures()
        assert found.gaps.keys() == own.keys()
        for name, gap in found.gaps.items():
            assert gap == found.figures()[name] - reference.figures()[name]
    assert evaluate(model, **sets, gold=model).gaps == dict.fromkeys(alone.figures(), 0.0)
    assert "(+" in str(found)


def test_each_set_is_walked_once() -> None:
    """Fails if membership inference runs the model again."""
    model = classifier()
    sizes: list[int] = []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    evaluate(model, forget=samples(9, 1), retain=samples(10, 2), test=samples(11, 3), batch_size=4)
    assert sum(sizes) == 9 + 10 + 11


def on_one_of_two_ranks(rank: int) -> dict[str, object]:
    data = samples(7, 1)
    repeating = DistributedSampler(data, num_replicas=2, rank=rank)
    forget = DataLoader(data, batch_size=3, sampler=repeating)
    found = evaluate(classifier(), forget=forget, retain=samples(10, 2), test=samples(1, 3))
    return {"figures": found.figures(), "forget": found.sets["forget"].count}


@pytest.mark.slow
def test_two_ranks_count_each_sample_once(tmp_path: Path) -> None:
    """Fails if the 8th draw with which DistributedSampler evens out 7 samples is counted.

    Also if a rank keeps its own half, or a rank without samples (test has 1) blocks the other.
    """
    sets = {"forget": samples(7, 1), "retain": samples(10, 2), "test": samples(1, 3)}
    expected = evaluate(classifier(), **sets).figures()
    for found in on_two_ranks(on_one_of_two_ranks, tmp_path):
        assert found["forget"] == 7
        assert found["figures"] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_left_of_an_evaluation() -> None:
    """Fails if it leaves eval mode, a gradient, a hook, moved statistics or a spent random
    number."""
    model = classifier()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = bits.digest(model.state_dict())
    random = torch.get_rng_state()
    evaluate(model, forget=samples(9, 1), retain=samples(9, 2), test=samples(9, 3), gold=model)
    assert [module.training for module in model.modules()] == modes
    assert bits.digest(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_is_left_of_an_evaluation_that_failed() -> None:
    """Fails if an exception in the middle of a set leaves the model in eval mode."""
    model, data = classifier(), samples(9, 1)
    data.tensors[1][5] = CLASSES
    before = bits.digest(model.state_dict())
    with pytest.raises(ValueError, match="label 5 is out of range"):
        evaluate(model, test=data, batch_size=4)
    assert all(module.training for module in model.modules())
    assert bits.digest(model.state_dict()) == before


def test_certain_and_impossible_outputs_have_finite_entropy() -> None:
    """Fails if 0 log 0 becomes NaN, or exp overflows."""

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[3e38, 0.0, -math.inf], [0.0, 90.0, -3e38]])[: len(x)]

    data = TensorDataset(torch.zeros(2, 1), torch.tensor([0, 1]))
    found = evaluate(Fixed(), forget=data, retain=data, test=data)
    assert found.sets["test"].accuracy == 100
    assert found.sets["test"].loss == pytest.approx(0.0, abs=1e-30)
    assert RATE in found.figures()


def test_half_precision_weights_are_read_as_float32() -> None:
    """Fails if a bfloat16 model and float32 inputs end in a dtype error."""
    model = classifier().to(torch.bfloat16)
    found = evaluate(model, test=samples(9, 1))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert found.figures() == evaluate(model.float(), test=samples(9, 1)).figures()


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return (self.data[i] for i in range(len(self.data)))


def test_iterable_data_sets_are_walked_as_they_come() -> None:
    """Fails if samples without indices are lost."""
    model, data = classifier(), samples(10, 1)
    streamed = evaluate(model, test=Stream(data), batch_size=4)
    assert streamed.figures() == evaluate(model, test=data, batch_size=4).figures()


def test_bad_input_is_named() -> None:
    """Fails if a bad set, a bad model or other data than gold's ends in figures."""
    model = classifier()
    with pytest.raises(ValueError, match="at least one of forget, retain, test, forget_test"):
        evaluate(model)
    with pytest.raises(ValueError, match="retain is empty"):
        evaluate(model, retain=Subset(samples(9, 1), []))
    with pytest.raises(ValueError, match="forget_test is empty"):
        evaluate(model, forget_test=Stream(samples(0, 1)))
    gold = evaluate(model, forget=samples(9, 1))
    with pytest.raises(ValueError, match="gold Evaluation has no figures for test"):
        evaluate(model, forget=samples(9, 1), test=samples(9, 2), gold=gold)
    with pytest.raises(ValueError, match="gold Evaluation is of another forget set"):
        evaluate(model, forget=samples(10, 1), gold=gold)
    with torch.no_grad():
        model[5].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="output for sample 0 of a batch of test is NaN"):
        evaluate(model, test=samples(9, 1))


def test_dict_is_the_same_after_json() -> None:
    """Fails if a figure has a type that JSON does not keep."""
    sets = {"forget": samples(9, 1), "retain": samples(9, 2), "test": samples(9, 3)}
    found = evaluate(classifier(), **sets, gold=classifier(1))
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert found.seconds > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seconds = 0.0  # type: ignore[misc]


def test_text_shows_the_lowest_of_many_classes() -> None:
    """Fails if a table of hundreds of classes floods the report, or hides the worst one."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x.squeeze(1).long().clamp(max=90), 100).float()

    y = torch.arange(100)
    found: Evaluation = evaluate(Constant(), test=TensorDataset(y.float().unsqueeze(1), y))
    assert "99: 0.0" in str(found)
    assert "and 80 classes that are no lower" in str(found)
