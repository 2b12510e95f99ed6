"""Models under FSDP2 on two real processes (gloo, loopback), measured sharded: the numbers of one
process, no rank with the whole, or an error on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepclean_hooks as deepclean
from lab import distributed_worker as plain
from lab import reference
from lab import sharded_worker as worker
from lab.processes import Results, each, found_by_ranks, worst

pytestmark = pytest.mark.slow  # the launch; test_collectives.py has the first check of FSDP2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank found in every check; one launch, for starting takes longer than checking."""
    folder = tmp_path_factory.mktemp("shards")
    return found_by_ranks("sharded_worker", folder)


@pytest.mark.parametrize("row", worker.TABLE, ids=worker.key)
def test_fisher(row: tuple[str, str, int, torch.dtype], results: Results) -> None:
    """Fails if squares are taken after FSDP2's average, a sample is left out or counted twice, or a
    weight is read that FSDP2 has let go."""
    name, _, count, dtype = row
    alone = deepclean.fisher_diagonal(
        worker.MODELS[name](dtype), plain.samples(0, count, dtype), batch_size=4, progress=False
    )
    for found in each(results, worker.key(row)):
        assert found["count"] == count
        assert torch.equal(found["samples"], alone.samples)
        assert found["sums"].keys() == alone.sums.keys()
        assert worst(found["sums"], alone.sums) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", worker.MODELS)
def test_against_one_sample_at_a_time(name: str, results: Results) -> None:
    """Fails if one process and two are wrong alike."""
    model = worker.MODELS[name](torch.float64).eval()
    truth = reference.squared_gradients(model, *plain.samples(0, 13, torch.float64).tensors)
    found = each(results, worker.key((name, "layers", 13, torch.float64)))[0]
    # Names of a module inside a wrapper for checkpointing lack the wrapper's.
    clean = {n.replace("_checkpoint_wrapped_module.", ""): t for n, t in truth.items()}
    sums = {n.replace("_checkpoint_wrapped_module.", ""): t for n, t in found["sums"].items()}
    assert worst(sums, clean) < 1e-9


def test_no_rank_holds_the_sums(results: Results) -> None:
    """Fails if a rank keeps more than its shards; of two copies each has all."""
    for row in worker.TABLE:
        found = each(results, worker.key(row))
        entries = sum(total.numel() for total in found[0]["sums"].values())
        copies = 2 if row[1] == "hybrid 2 x 1" else 1
        assert all(one["alike"] for one in found)
        if row[1] != "no root":  # what is in no shard lies on every rank
            assert sum(one["here"] for one in found) == copies * entries


def test_loops_only_what_must_be(results: Results) -> None:
    """Fails if sharding sends parameters to the one-sample loop, or none goes where one must."""
    for name in worker.MODELS:
        for layout in ("root", "layers"):
            found = each(results, worker.key((name, layout, 13, torch.float64)))[0]
            if name == "looped":
                assert found["loop"] == ["weight"]
            elif name != "chosen":  # what is used depends on the batch
                assert found["loop"] == []


def alone(model: torch.nn.Module) -> deepclean.Session:
    """The same session in one process, up to the selection."""
    run = plain.session(model).measure(plain.FORGET, plain.RETAIN)
    run.select()
    return run


def test_whole_session(results: Results) -> None:
    """Fails if a figure is that of a shard, masks or weights differ from those of whole models, or
    a frozen bit moves."""
    one, other = each(results, "session")
    whole = each(results, "ddp")[0]
    run = alone(plain.network())
    for name, mask in run.selection.masks.items():
        packed = torch.from_numpy(np.packbits(mask.reshape(-1).numpy()))
        assert torch.equal(one["stored"][name], packed)
    for key in ("masks", "selected", "layers", "dead", "frozen moved", "reported", "steps"):
        assert one[key] == other[key] == whole[key], key
    assert one["frozen moved"] == one["reported"] == 0
    assert one["free moved"] > 100
    assert one["selected"] == run.report.selected_entries
    assert one["digests"][0] == whole["digests"][0] == run.report.model_before
    # Not the digest of the model: FSDP2 leaves each rank running statistics of its own.
    assert one["weights"] == other["weights"]
    assert one["here"] + other["here"] == sum(m.numel() for m in run.selection.masks.values())
    for name, value in one["final"].items():
        assert torch.allclose(value, whole["final"][name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("when", ["before", "after"])
def test_scores(when: str, results: Results) -> None:
    """Fails if a sample that fills up a batch is scored, or one is left out."""
    whole = each(results, "ddp")[0][when]
    for found in each(results, "session"):
        for name, scores in whole.items():
            assert found[when][name].keys() == scores.keys()
            assert (
                found[when][name]["count"] == scores["count"] == {"forget": 13, "retain": 37}[name]
            )
            assert found[when][name]["accuracy"] == scores["accuracy"]
            assert found[when][name]["loss"] == pytest.approx(scores["loss"], abs=1e-5)


def test_context_manager(results: Results) -> None:
    """Fails if unlearning() takes another way than the session."""
    for found in each(results, "context_manager"):
        assert found["masks"] == each(results, "session")[0]["masks"]
        assert found["frozen moved"] == found["reported"] == 0
        assert found["free moved"] > 100


def test_hook_stored_and_resumed(results: Results) -> None:
    """Fails if masks do not come back in shards, or a resumed run ends elsewhere."""
    for found in each(results, "resumed_hook"):
        assert found["agree"]
        assert found["sharded"]
        assert found["frozen moved"] == found["reported"] == 0
        assert found["free moved"] > 100


def test_stored_measurement(results: Results) -> None:
    """Fails if a diagonal does not come back bit for bit, or selects something else."""
    for found in each(results, "stored"):
        assert found["same"]
        assert found["count"] == 0
        assert found["left"] < 1e-5


def test_dead_entries(results: Results) -> None:
    """Fails if dead entries are counted of one shard, or none are dead to be counted."""
    one, other = each(results, "dead")
    assert one == other
    assert one["sharded"] == one["whole"]
    assert sum(count or 0 for count in one["whole"].values()) > 0


@pytest.mark.parametrize("method", ["ssd", "deepclean"])
def test_other_methods(results: Results, method: str) -> None:
    """Fails if SSD dampens otherwise on shards, or DeepClean keeps to a cap of each shard's own."""
    for found in each(results, "others"):
        assert found[method]["off"] < 1e-6
        assert 0 < found[method]["selected"] <= found[method]["most"]
        assert ("raised from" in found[method]["criterion"]) == (method == "deepclean")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("moved_on_one", "1 frozen entries moved: 1.bias (1)"),
        ("bad_label_on_one", "label 99 is out of range"),
        ("unreadable_on_one", "no such file"),
        ("not_finite_on_one", "forget, batch 1"),
        ("bad_gradient_on_one", "forget, batch 1: the gradient of first.weight"),
        ("mixed_precision", "MixedPrecisionPolicy(param_dtype=...)"),
        ("half_weights", "shard float32 weights"),
        ("tensor_parallel", "use fully_shard()"),
        ("half_of_the_ranks", "1 of the 2 ranks"),
        ("other_method", "the method assd needs them whole"),
        ("chosen_gamma", 'gamma="auto" needs them whole'),
        ("unwritable", "no such folder"),
        ("mixed_samples", "mixes the samples"),
    ],
)
def test_errors_on_both_ranks(name: str, said: str, results: list[dict[str, Any]]) -> None:
    """Fails if a rank raises alone and leaves the other waiting, or an error does not say why."""
    for found in results:
        assert said in found[name]["error"]


def test_stored_shards_are_an_ordinary_file(tmp_path: Path) -> None:
    """Fails if the tensors of a file that was written one by one are not where its header says."""
    from safetensors.torch import load_file

    from deepclean_hooks.stored import tensor_file

    tensors = {
        "odd": torch.arange(7, dtype=torch.int64),
        "sums/a": torch.randn(3, 5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "sums/b": torch.randn(3),
    }
    tensor_file.write(tensors, tmp_path / "file", {"count": "3"})
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
