"""Two real processes (gloo, loopback): the same numbers and bits as in one, or an error on both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import deepclean_hooks as deepclean
from lab import distributed_worker as worker
from lab.processes import ROOT, Results, each, found_by_ranks, torchrun, worst

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank found in every check; one launch, for starting takes longer than checking."""
    folder = tmp_path_factory.mktemp("ranks")
    return found_by_ranks("distributed_worker", folder)


@pytest.mark.parametrize("count", [13, 37, 1])
def test_fisher_in_float64(count: int, results: Results) -> None:
    """Fails if a sample is left out or counted twice; 1: fewer samples than ranks."""
    truth = worker.fisher(count, torch.float64)
    for found in each(results, f"fisher {count}"):
        assert found["count"] == count
        assert torch.equal(found["samples"], truth["samples"])
        assert worst(found["sums"], truth["sums"]) < 1e-12


def test_fisher_in_float32(results: Results) -> None:
    """Fails if the reduction over ranks loses digits."""
    truth = worker.fisher(37, torch.float32)
    for found in each(results, "fisher 37 float32"):
        assert worst(found["sums"], truth["sums"]) < 1e-6


def test_fisher_is_the_same_on_all_ranks(results: Results) -> None:
    """Fails if the ranks do not end with the same bits."""
    one, other = each(results, "fisher 37 float32")
    assert all(torch.equal(one["sums"][name], other["sums"][name]) for name in one["sums"])


@pytest.mark.parametrize("kind", ["accelerate", "sampler"])
def test_padding_loaders(kind: str, results: Results) -> None:
    """Fails if samples that a loader repeats to make the ranks even are counted twice."""
    truth = worker.fisher(13, torch.float64)
    for found in each(results, f"padded {kind}"):
        assert found["walked"] > 13  # it does repeat some
        assert found["count"] == 13
        assert worst(found["sums"], truth["sums"]) < 1e-12


@pytest.mark.parametrize("name", ["ddp", "accelerate_hook", "fsdp2"])
def test_whole_run(name: str, results: Results) -> None:
    """Fails if masks differ between ranks or from those of one process, or a frozen bit moves."""
    one, other = each(results, name)
    assert one == other
    assert one["frozen moved"] == 0
    assert one["free moved"] > 100
    assert one["reported"] == 0
    assert one["steps"] == 4
    alone = worker.session(worker.perceptron() if name == "fsdp2" else worker.network())
    alone.measure(worker.FORGET, worker.RETAIN).select()
    masks = {n: m.to(torch.uint8) for n, m in alone.free.items()}
    assert worker.digest(masks) == one["masks"]


def test_counts_on_accelerate(results: Results) -> None:
    """Fails if prepared loaders change what is measured or scored."""
    for found in each(results, "accelerate_hook"):
        assert found["counts"] == [13, 37]
        assert found["scored"] == [13, 37]


def test_sharded_without_a_guard(results: Results) -> None:
    """The opposite: under FSDP2 the same training moves what would be frozen."""
    assert each(results, "unguarded_fsdp2")[0]["frozen moved"] > 100


def test_sharded_and_resumed(results: Results) -> None:
    """Fails if masks or weights of shards do not come back, or a resumed run ends elsewhere."""
    for found in each(results, "resumed_fsdp2"):
        assert found["agree"]
        assert found["frozen moved"] == 0
        assert found["free moved"] > 100
        assert found["steps"] == 4  # 2 before the checkpoint and 2 after


def test_sharded_scores(results: Results) -> None:
    """Fails if a sharded model is not scored, or a sample that fills up a batch is counted."""
    for found in each(results, "fsdp2"):
        assert [found["after"][name]["count"] for name in ("forget", "retain")] == [13, 37]


def test_recipe_in_two_processes(results: Results) -> None:
    """Fails if unlearn() on two processes trains another recipe than on one."""
    model = worker.perceptron().double()
    forget, retain = (worker.samples(*c, torch.float64) for c in ((0, 13), (13, 49)))
    report = deepclean.unlearn(
        model, forget, retain, method=worker.METHOD, epochs=2, batch_size=12, progress=False
    )
    one, other = each(results, "recipe")
    for name, value in model.state_dict().items():
        assert torch.equal(one["state"][name], other["state"][name])
        assert torch.allclose(one["state"][name], value, rtol=0, atol=1e-9)
    assert one["moved"] == 0
    assert one["steps"] == report.optimizer_steps == 6
    assert one["accuracy"] == report.scores["after"]["sets"]["retain"]["accuracy"]
    assert not one["leftover"]


def test_drifted_buffers(results: Results) -> None:
    """Fails if each rank scores its share with running statistics of its own."""
    alone = deepclean.evaluate(worker.network(), test=worker.RETAIN).sets["test"]
    for found in each(results, "drifted_buffers"):
        assert found["count"] == 37
        assert found["loss"] == pytest.approx(alone.loss, abs=1e-6)


@pytest.mark.parametrize("engine", ["FullyShardedDataParallel", "DeepSpeedEngine"])
@pytest.mark.parametrize("nested", [False, True])
def test_engines_are_refused_by_name(engine: str, nested: bool) -> None:
    """Fails if a model is measured whose weights are flattened pieces, at the root or below it."""
    model = type(engine, (nn.Sequential,), {})(worker.perceptron())
    with pytest.raises(ValueError, match=engine):
        worker.session(nn.Sequential(model) if nested else model)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other_gamma", "the method differs between ranks"),
        ("other_scores", "scores differs between ranks"),
        ("other_loss", "the loss differs between ranks"),
        ("other_statistics", "norm_statistics differs between ranks"),
        ("other_way", "the way into the run differs between ranks"),
        ("other_weights", "the set of measured weights differs between ranks"),
        ("other_split", "set differs between ranks"),
        ("other_content", "the forget set differs between ranks"),
        ("other_length", "the forget set differs between ranks"),
        ("other_masks", "the selection differs between ranks"),
        ("empty_on_one", "forget is empty"),
        ("unreadable_on_one", "no such file"),
        ("bad_label_on_one", "label 99 is out of range"),
        ("bad_label_when_scored", "label 99 is out of range"),
        ("powersgd", "PowerSGD"),
        ("guarded_before_sharding", "set the guard after what replaces them"),
    ],
)
def test_errors_on_both_ranks(name: str, said: str, results: Results) -> None:
    """Fails if ranks that disagree go on, or one raises alone and leaves the other waiting."""
    for found in results:
        assert said in found[name]["error"]


def test_ranks_that_end_apart_are_told(results: Results) -> None:
    """Fails if other numbers of steps or other weights on the ranks pass in silence, or ranks that
    agree are warned of."""
    for found in results:
        steps, weights, alike = found["ended apart"]
        assert any("different numbers of optimizer steps: [1, 2]" in text for text in steps)
        assert any("the ranks ended with different weights" in text for text in weights)
        assert not any("ranks" in text for text in alike)


@pytest.mark.slow
def test_accelerate_example(tmp_path: Path) -> None:
    """Fails if the example does not run under torchrun, prints twice, forgets nothing, or cannot be
    resumed."""
    tiny = ["--cpu", "--depth", "8", "--train-epochs", "3", "--batch-size", "32"]
    stored = ["--state", str(tmp_path), "--json", str(tmp_path / "report.json")]
    out = torchrun(EXAMPLES / "accelerate_cifar10.py", *tiny, *stored, "--epochs", "1")
    assert out.count("Unlearning report") == 1
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["frozen_entries_moved"] == 0
    before, after = (report["scores"][when]["sets"]["forget"] for when in ("before", "after"))
    assert before["accuracy"] > 80
    assert after["accuracy"] < 10
    out = torchrun(EXAMPLES / "accelerate_cifar10.py", *tiny, *stored, "--epochs", "2", "--resume")
    again = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert again["selected_entries"] == report["selected_entries"]
    assert again["phase"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_trainer_example(library: str, tmp_path: Path) -> None:
    """Fails if the example does not run under torchrun, prints twice or moves a frozen weight."""
    tiny = ["--cpu", "--width", "32", "--depth", "2", "--train-epochs", "2", "--epochs", "1"]
    folder = ["--library", library, "--output-dir", str(tmp_path)]
    out = torchrun(EXAMPLES / "trainer_vit.py", *tiny, *folder)
    assert out.count("Unlearning report") == 1
    stored = (tmp_path / "unlearned" / "report.json").read_text(encoding="utf-8")
    assert json.loads(stored)["frozen_entries_moved"] == 0
