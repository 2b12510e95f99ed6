"""Figures of a few samples stay out of what is shown, and cannot be computed from the rest."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.__main__ import main
from deepclean_hooks.report import small_sets
from deepclean_hooks.report.verify import verify
from lab.planted import CLASSES, FORGET, RETAIN, TEST, WIDTH, gold, original

# Runs without a loop of their own are enough here.
pytestmark = pytest.mark.filterwarnings("ignore:no optimizer step of this model")


def forgotten(count: int, **options: Any) -> deepclean.Report:
    """A run, without training, that forgets the first samples."""
    options = {"test": TEST, "gold": [gold(seed) for seed in (10, 11)], **options}
    with deepclean.unlearning(
        copy.deepcopy(original()),
        forget=Subset(FORGET, range(count)),
        retain=RETAIN,
        method=deepclean.DeepClean(gamma=1.2),
        batch_size=200,
        **options,
    ) as run:
        pass
    return run.report


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float):
        yield value


@pytest.mark.filterwarnings("ignore:.*dead|.*candidate entry")
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_small_request_shows_no_loss_and_no_label(count: int) -> None:
    """Fails if the exact loss, the class or a rank of a single sample gets into the JSON, the page,
    the Markdown or the card, of a gold model too; or an auditor does not get it."""
    report = forgotten(count)
    exact = json.loads(report.to_json(exact=True))
    losses = {exact["scores"][when]["sets"]["forget"]["loss"] for when in ("before", "after")} | {
        exact["scores"]["after"]["gold"]["sets"]["forget"]["loss"]
    }
    losses |= {exact["scores"]["after"]["spread"]["forget.loss"]["mean"]}
    assert losses <= set(numbers(exact))
    assert exact["withheld"] == {}
    told = json.loads(report.to_json())
    assert not losses & set(numbers(told))
    assert told["withheld"] == {"least": 10, "sets": ["forget"], "classes": []}
    for score in (*told["scores"].values(), told["scores"]["after"]["gold"]):
        assert set(score["sets"]["forget"]) == {"count", "accuracy"}
        assert "forget" not in score["histograms"]
        names = {n for n in score["figures"] if not n.startswith(("retain.", "test."))}
        assert names <= {
            "forget.accuracy",
            "attack.entropy_regression.rate",
            "attack.entropy_regression.attacker_accuracy",
            "attack.confidence_svc.efficacy",
        }
        assert all(attack["roc"] == [] for attack in score["attacks"].values())
        assert score["distances"]["js_divergence"]["value"] is None
    assert set(told["scores"]["after"]["gaps"]) <= set(told["scores"]["after"]["figures"])
    assert all(check.right is not False for check in verify(told, {"x": torch.ones(2)})[:9])
    shown = (report.to_html(), report.to_markdown(), report.to_model_card())
    for text in shown:
        assert not any(f"{loss:.3f}" in text for loss in losses)
        assert "fewer than 10 samples tell the class and the exact loss" in text
    auditor = (
        report.to_html(exact=True),
        report.to_markdown(exact=True),
        report.to_model_card(exact=True),
    )
    for text in auditor:
        assert any(f"{loss:.3f}" in text for loss in losses)
        assert f"exact figures of a set of {count}" in text


def test_a_set_of_ten_is_shown_and_says_nothing() -> None:
    """Fails if figures are withheld where nobody can be singled out."""
    told = forgotten(10).to_dict()
    assert "forget.loss" in told["scores"]["after"]["figures"]
    assert told["scores"]["after"]["histograms"]["forget"]
    assert "forget" not in told["withheld"].get("sets", [])


def score(counts: dict[str, int], loss: float = 1.25) -> dict[str, Any]:
    """An evaluation of a test set with so many samples in each class."""
    x = torch.randn(sum(counts.values()), WIDTH, generator=torch.Generator().manual_seed(4))
    y = torch.cat([torch.full((n,), int(label)) for label, n in counts.items()])
    return deepclean.evaluate(original(), test=TensorDataset(x, y), progress=False).to_dict()


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"0": 1, "1": 30, "2": 20}, ["1"]),
        ({"0": 5, "1": 6, "2": 20}, ["2"]),
        ({"0": 9, "1": 10}, []),
        ({"0": 10, "1": 12}, ["0", "1"]),
        ({"0": 3}, None),
    ],
)
def test_what_is_left_over_is_no_small_class(
    counts: dict[str, int], shown: list[str] | None
) -> None:
    """Fails if the one class that is left out follows from the whole minus the others."""
    kept = small_sets.evaluation(score(counts))
    if shown is None:  # the whole set is small
        assert set(kept["sets"]["test"]) == {"count", "accuracy"}
        return
    assert sorted(kept["sets"]["test"]["per_class"]) == shown
    classes = {name.split(".")[1] for name in kept["figures"] if name.count(".") == 2}
    assert sorted(classes) == shown
    assert sum(n for label, n in counts.items() if label not in shown) not in range(1, 10)


def test_the_trials_of_gamma_show_no_loss_of_a_small_request() -> None:
    """Fails if gamma="auto" tells what the scores withhold."""
    behaviour = {"forget_loss": 0.125, "forget_accuracy": 100.0, "held_out_loss": 2.0}
    trial = {
        "gamma": 2.0,
        "selected_entries": 3,
        "distance": 1.0,
        "as_unseen": True,
        "behaviour": behaviour,
    }
    choice = {
        "gamma": 2.0,
        "rule": "r",
        "reason": "w",
        "original": behaviour,
        "trials": [trial],
    }
    report = {"scores": {}, "forget_samples": 1, "gamma_choice": choice}
    assert 0.125 not in set(numbers(small_sets.withheld(report)))
    assert 0.125 in set(numbers(small_sets.withheld({**report, "forget_samples": 10})))


def test_the_page_of_an_exact_file_is_withheld_too(tmp_path: Path) -> None:
    """Fails if the command shows what the report's own page would not."""
    report = forgotten(1, gold=None)
    loss = report.scores["after"]["sets"]["forget"]["loss"]
    (tmp_path / "r.json").write_text(report.to_json(exact=True), encoding="utf-8")
    assert main(["page", str(tmp_path / "r.json")]) == 0
    assert f"{loss:.3f}" not in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert main(["page", str(tmp_path / "r.json"), "--exact"]) == 0
    assert f"{loss:.3f}" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_page_says_who_can_look_a_sample_up() -> None:
    """Fails if it claims that only holders of a sample can: 4,096 guesses find a row of 12 bits."""
    report = forgotten(1, gold=None, scores=False)
    text = re.sub(r"\s+", " ", report.to_html())
    assert "nobody else" not in text
    assert "whoever can guess it exactly" in text
    assert CLASSES == 10
