"""Gamma sweeps: one measurement, the same selections as a session's, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepclean_hooks as deepclean
from deepclean_hooks.measure import fisher
from deepclean_hooks.measure.request import Request
from deepclean_hooks.stored import bits
from deepclean_hooks.tuning.gamma_sweep import gamma_sweep
from lab.planted import FORGET, RETAIN, TEST, gold, original

GAMMAS = (5.0, 1.0, 2.0)


def tune(model: nn.Module) -> None:
    """A loop that knows nothing of unlearning, and whose optimizer moves everything it owns."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(RETAIN.tensors[0]), RETAIN.tensors[1]).backward()
        optimizer.step()


def test_selection_is_that_of_a_session_and_shrinks_with_gamma() -> None:
    """Fails if a sweep selects in another way than a session with that gamma."""
    sweep = gamma_sweep(original(), FORGET, RETAIN, gammas=GAMMAS, scores=False)
    assert [point.gamma for point in sweep.points] == [1.0, 2.0, 5.0]
    sizes = [point.selected_entries for point in sweep.points]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    for point in sweep.points:
        run = deepclean.Session(original(), deepclean.DeepClean(gamma=point.gamma), scores=False)
        preview = run.measure(FORGET, RETAIN).select()
        expected = {x.name: x.selected for x in preview.layers if x.name in sweep.entries}
        assert point.selected == expected
        assert preview.trainable_entries == sweep.trainable_entries
        assert point.zeroed == point.tuned == {}


def test_data_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if each gamma costs a Fisher pass."""
    calls: list[str] = []

    measured = fisher.diagonal

    def counted(request: Request) -> deepclean.FisherDiagonal:
        calls.append(request.name)
        return measured(request)

    monkeypatch.setattr(fisher, "diagonal", counted)
    gamma_sweep(original(), FORGET, RETAIN, gammas=GAMMAS, scores=False)
    assert calls == ["forget", "retain"]


def test_behaviour_is_that_of_the_zeroed_and_of_the_held_and_tuned_model() -> None:
    """Fails if a model is tuned from another gamma's end, if frozen weights move, or if the
    model itself does."""
    model = original()
    before = bits.digest(dict(model.named_parameters()))
    sweep = gamma_sweep(model, FORGET, RETAIN, gammas=(1.0, 5.0), fine_tune=tune, test=TEST)
    assert bits.digest(dict(model.named_parameters())) == before
    assert sweep.original["forget.accuracy"] == 100
    for point in sweep.points:
        copy = type(model)(*(type_of(m) for m in model))
        copy.load_state_dict(model.state_dict())
        run = deepclean.Session(copy, deepclean.DeepClean(gamma=point.gamma), scores=False)
        run.measure(FORGET, RETAIN).select()
        run.reset()
        sets = {"forget": FORGET, "retain": RETAIN, "test": TEST}
        zeroed = deepclean.evaluate(copy, **sets, membership=False).figures()
        assert point.zeroed == pytest.approx(zeroed)
        run.guard()
        tune(copy)
        run.finish()
        tuned = deepclean.evaluate(copy, **sets, membership=False).figures()
        assert point.tuned == pytest.approx(tuned)
    first, last = sweep.points
    assert first.zeroed["retain.accuracy"] < last.zeroed["retain.accuracy"]
    assert json.loads(json.dumps(sweep.to_dict())) == sweep.to_dict()
    assert "gamma 5" in str(sweep)


def type_of(module: nn.Module) -> nn.Module:
    """A module of the same kind and size with other weights."""
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features)
    return type(module)()


def test_nothing_is_left_after_a_fine_tune_that_failed() -> None:
    """Fails if an exception in the user's loop leaves hooks or a changed model."""
    model = gold()
    before = bits.digest(dict(model.named_parameters()))

    def broken(copy: nn.Module) -> None:
        tune(copy)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        gamma_sweep(model, FORGET, RETAIN, gammas=(2.0,), fine_tune=broken, scores=False)
    assert bits.digest(dict(model.named_parameters())) == before
    deepclean.Session(model, deepclean.DeepClean())  # refused while a guard holds the model


def test_bad_gammas_are_refused_before_anything_is_measured() -> None:
    """Fails if a sweep of an hour ends at its last gamma, which was 0."""
    with pytest.raises(ValueError, match="gamma must be a positive number"):
        gamma_sweep(original(), FORGET, RETAIN, gammas=(2.0, 0.0))
    with pytest.raises(ValueError, match="gammas is empty"):
        gamma_sweep(original(), FORGET, RETAIN, gammas=())


def test_plots_are_written(tmp_path: Path) -> None:
    """Fails if a figure lacks a line, is written under a name that promises another format, or a
    sweep without figures draws nothing."""
    sweep = gamma_sweep(original(), FORGET, RETAIN, gammas=GAMMAS, fine_tune=tune)
    sweep.plot_selection(tmp_path / "3.svg")
    sweep.plot_behaviour(tmp_path / "4.svg")
    for name, words in (
        ("3.svg", {"selected entries", "all that may be selected", *sweep.entries}),
        ("4.svg", {"accuracy", "data kept, W_f at 0", "forgotten data, fine-tuned"}),
    ):
        drawn = ElementTree.fromstring((tmp_path / name).read_text(encoding="utf-8"))
        texts = {element.text for element in drawn.iter() if element.text}
        assert words <= texts
        lines = [element for element in drawn.iter() if element.tag.endswith("polyline")]
        assert len(lines) == (len(sweep.entries) + 1 if name == "3.svg" else 4)
        assert all(len(line.get("points", "").split()) == len(GAMMAS) for line in lines)
    with pytest.raises(ValueError, match=r"written as \.svg"):
        sweep.plot_selection(tmp_path / "3.png")
    bare = gamma_sweep(original(), FORGET, RETAIN, gammas=GAMMAS, scores=False)
    with pytest.raises(ValueError, match="scores=True"):
        bare.plot_behaviour(tmp_path / "5.svg")
