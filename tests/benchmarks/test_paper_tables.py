"""The paper's tables: what they are made of, their sums, and a run that is killed and goes on."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks.lab.data import KINDS, images
from benchmarks.paper_tables import variants
from benchmarks.paper_tables.augment import cropped
from benchmarks.paper_tables.cases import Case
from benchmarks.paper_tables.cells import BOUNDS, cell, cell_file
from benchmarks.paper_tables.collect import gold_to_gold, summary
from benchmarks.paper_tables.methods import MAIN, MORE, contender
from benchmarks.paper_tables.models import gold, original
from benchmarks.paper_tables.networks import NETWORKS, network
from benchmarks.paper_tables.recipes import PAPER, Recipe, _schedule, train
from benchmarks.paper_tables.setups import setup
from benchmarks.paper_tables.tables import placed, table
from deepclean_hooks import DeepClean, FisherDiagonal
from deepclean_hooks.testing import check_method

ROOT = Path(__file__).resolve().parents[2]


def diagonal(**sums: list[list[float]] | list[float]) -> FisherDiagonal:
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in sums.items()}
    return FisherDiagonal(tensors, 1, torch.zeros(1, dtype=torch.int64), {"computed": "float64"})


FORGET = diagonal(w=[[8.0, 1.0, 3.0, 9.0]], v=[[6.0, 6.0, 1.0, 1.0]], b=[5.0, 5.0])
RETAIN = diagonal(w=[[1.0, 1.0, 1.0, 3.0]], v=[[1.0, 2.0, 1.0, 2.0]], b=[1.0, 9.0])
WEIGHTS = {name: torch.full_like(total, 2.0) for name, total in FORGET.sums.items()}


@pytest.mark.filterwarnings("ignore:.* of the reset entries are dead:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        variants.ZeroOnly(),
        variants.AllFree(),
        variants.Dampened(),
        variants.ToInitialValues(),
        variants.Quota(),
        variants.Reselected(),
    ],
    ids=lambda variant: variant.name,
)
def test_variants_keep_the_promises_of_a_method(variant: DeepClean) -> None:
    """Fails if an ablation moves a frozen entry, depends on batches or leaves a trace."""
    check_method(variant)


def test_variants_differ_from_deepclean_in_one_thing() -> None:
    """Fails if a variant picks other entries than it says, or gives them other values."""
    plain = DeepClean(gamma=2.0, one_dimensional=True).select(FORGET, RETAIN)
    assert plain.masks["w"].tolist() == [[True, False, True, True]]
    assert plain.masks["b"].tolist() == [True, False]
    free = variants.AllFree(gamma=2.0)
    chosen = free.select(FORGET, RETAIN)
    assert chosen.masks["w"].equal(plain.masks["w"])
    assert not chosen.masks["b"].any()
    assert all(bool(mask.all()) for mask in free.free(chosen).values())
    assert variants.ZeroOnly(gamma=2.0).free(plain) == {}
    damped = variants.Dampened(gamma=2.0).new_values(WEIGHTS, plain, FORGET, RETAIN)
    assert damped["w"][0, 3].item() == pytest.approx(2.0 * 3 / 9)
    kept = variants.Reselected(gamma=2.0).new_values(WEIGHTS, plain, FORGET, RETAIN)
    assert kept["w"].equal(WEIGHTS["w"])
    assert variants.OfBatchMeans().measured_by != DeepClean().measured_by


def test_quota_takes_the_same_share_of_every_parameter() -> None:
    """Fails if one parameter gives more than another, or not its highest ratios."""
    matrices = [
        diagonal(w=one.sums["w"].tolist(), v=one.sums["v"].tolist()) for one in (FORGET, RETAIN)
    ]
    plain = DeepClean(gamma=2.0).select(*matrices)
    assert [int(plain.masks[name].sum()) for name in "wv"] == [3, 2]  # 5 of 8 together
    chosen = variants.Quota(gamma=2.0).select(*matrices)
    assert [int(chosen.masks[name].sum()) for name in "wv"] == [2, 2]
    assert chosen.masks["w"].tolist() == [[True, False, False, True]] or chosen.masks[
        "w"
    ].tolist() == [[True, False, True, False]]  # ratios 8, 1, 3, 3
    assert chosen.masks["v"].tolist() == [[True, True, False, False]]


def test_crops_are_those_of_one_image_at_a_time() -> None:
    """Fails if rows and columns are mixed up, or an image gets another's shift."""
    pixels = torch.rand(5, 2, 6, 6)
    found = cropped(pixels, 2, True, torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(pixels, (2,) * 4)
    for before, after in zip(padded, found, strict=True):
        windows = [before[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
        assert any(after.equal(one) or after.equal(one.flip(2)) for one in windows)
    assert not found.equal(pixels)
    still = cropped(pixels, 0, False, torch.Generator())
    assert still.equal(pixels)


def test_the_papers_schedule() -> None:
    """Fails if the rate is not 0.1, divided by 5 after epochs 6, 12 and 16 of 20."""
    recipe = PAPER["cifar10"]
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=recipe.lr)
    schedule = _schedule(optimizer, recipe, steps=3)
    rates = []
    for _ in range(recipe.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        for _ in range(3):
            optimizer.step()
            schedule.step()
    expected = [0.1] * 6 + [0.02] * 6 + [0.004] * 4 + [0.0008] * 4
    assert rates == pytest.approx(expected)
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)


def test_training_learns_and_is_drawn_by_the_seed() -> None:
    """Fails if two runs of one seed differ, or two seeds do not."""
    kind = KINDS["digits"]
    data = TensorDataset(torch.randn(40, 1, 8, 8), torch.arange(40) % 10)
    recipe = Recipe("fast", 2, batch_size=8)

    def trained(seed: int) -> torch.Tensor:
        model = network("resnet8-narrow", kind, seed=0)
        train(model, data, kind, recipe, seed)
        assert not model.training
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert trained(1).equal(trained(1))
    assert not trained(1).equal(trained(2))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("data", ["mnist", "tinyimagenet32"])
def test_networks_take_the_data(name: str, data: str) -> None:
    """Fails if a network does not take the channels or the size of a data set, or two seeds are the
    same network."""
    kind = KINDS[data]
    model = network(name, kind, seed=0).eval()
    with torch.no_grad():
        found = model(torch.zeros(2, kind.channels, kind.size, kind.size))
    assert found.shape == (2, kind.classes)
    first, other = (next(network(name, kind, seed=s).parameters()) for s in (0, 1))
    assert not first.equal(other)
    assert first.equal(next(model.parameters()))


def test_part_of_an_ordered_set_holds_every_class(tmp_path: Path) -> None:
    """Fails if the first images of a set that is ordered by class are all of one class."""
    (tmp_path / "load.py").write_text(
        "import numpy as np\n"
        "def tinyimagenet32(split):\n"
        "    assert split in ('train', 'val')\n"
        "    return np.zeros((400, 32, 32, 3), np.uint8), np.arange(400) // 2\n"
    )
    found = images("tinyimagenet32", tmp_path, train=200, test=10)
    assert len(found.train) == 200
    assert len(set(found.train.tensors[1].tolist())) > 190
    with pytest.raises(ValueError, match="no function mnist"):
        images("mnist", tmp_path)
    with pytest.raises(ValueError, match="--data-dir"):
        images("mnist", None)


def test_wrong_names_say_which_are_right() -> None:
    """Fails if a typing error ends in a traceback of something else."""
    for wrong in ({"scale": "tiny"}, {"data": "svhn"}, {"recipe": "slow"}):
        with pytest.raises(ValueError, match="must be"):
            setup(**{"scale": "smoke", **wrong})
    with pytest.raises(ValueError, match="must be one of"):
        contender("deep-clean")
    with pytest.raises(ValueError, match="must be one of"):
        network("resnet9", KINDS["mnist"], seed=0)


def test_models_are_trained_once_and_each_setting_has_its_own(tmp_path: Path) -> None:
    """Fails if a second call trains again, a gold is read for the original, or the forget set was
    in the gold's training set."""
    chosen = setup("smoke", cache=tmp_path)
    first = original(chosen, 0)
    stored = {path: path.stat().st_mtime_ns for path in chosen.folder.iterdir()}
    again = original(setup("smoke", cache=tmp_path), 0)
    assert {path: path.stat().st_mtime_ns for path in chosen.folder.iterdir()} == stored
    assert first.seconds == again.seconds > 0
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert one.equal(other)
    assert setup("smoke", recipe="paper", cache=tmp_path).folder != chosen.folder
    case = Case(chosen, "class", 0)
    row = cell(case, "gold")
    assert row["acc_df"] == 0
    assert row["delta_acc_df"] == 0
    assert row["time_ratio"] == 1
    assert cell(case, "original")["acc_df"] > 90
    assert gold(chosen, "class", 0).seconds == row["seconds"]


def test_a_budget_in_the_name_changes_the_epochs_alone(tmp_path: Path) -> None:
    """Fails if `deepclean@1` trains as long as `deepclean`, or a row lacks a hyper-parameter."""
    case = Case(setup("smoke", cache=tmp_path), "class", 0)
    short, plain = cell(case, "deepclean@1"), cell(case, "deepclean")
    assert short["settings"]["training"].pop("epochs") == 1
    assert plain["settings"]["training"].pop("epochs") == 3
    assert short["settings"] == plain["settings"]
    assert plain["settings"]["gamma"] == 2.0
    assert plain["settings"]["training"]["lr"] == 1e-3
    assert plain["frozen_entries_moved"] == 0
    assert plain["delta_acc_df"] == plain["acc_df"] - cell(case, "gold")["acc_df"]


def made_up(seed: int, method: str, value: float) -> dict[str, object]:
    figures = {name: value for name in ("acc_dr", "acc_df", "acc_test", "mia", "average_gap")}
    return {"scenario": "random", "method": method, "seed": seed, **figures}


def test_summary_and_table() -> None:
    """Fails if seeds of two methods are mixed, the spread is not the sample deviation, or the gold
    spread is not the largest difference."""
    rows = [made_up(s, "gold", v) for s, v in enumerate((90.0, 92.0, 95.0))]
    rows += [made_up(0, "deepclean", 80.0)]
    told = summary(rows)
    assert told["random"]["gold"]["acc_dr"] == {
        "mean": pytest.approx(92.333, abs=1e-3),
        "std": pytest.approx(statistics.stdev([90.0, 92.0, 95.0])),
    }
    assert told["random"]["deepclean"]["mia"] == {"mean": 80.0, "std": None}
    assert gold_to_gold(rows)["random"]["mia"] == 5.0
    lines = table(told["random"], ["gold", "absent", "deepclean"]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| gold | 3 | 92.3 ± 2.5 |")
    assert lines[3].startswith("| **deepclean** | 1 | 80.0 |")


def test_placed_keeps_the_prose() -> None:
    """Fails if text outside the marks changes, or a page without marks passes."""
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    new = placed(page, "x", "new")
    assert new == "a\n<!-- x -->\n\nnew\n\n<!-- end of x -->\nb\n"
    assert placed(new, "x", "new") == new
    with pytest.raises(ValueError, match="no place"):
        placed("nothing", "x", "new")


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.paper_tables", "--scale", "smoke"]
    command += ["--cache", str(folder / "cache"), "--output", str(folder / "rows.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_smoke_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Fails if a cell or a network is made twice, a row is missing or half written, or a path of
    this machine is written down."""
    first = start(tmp_path)
    until = time.monotonic() + 300
    while len(list(tmp_path.rglob("cells/*.json"))) < 4:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    first.kill()
    first.communicate()
    assert not (tmp_path / "rows.json").exists()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*") if not p.name.startswith(".")}
    second = start(tmp_path)
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    told = json.loads((tmp_path / "rows.json").read_text())
    wanted = {
        (scenario, method)
        for scenario in ("random", "class")
        for method in (*BOUNDS, *MAIN, *MORE)
        if method in BOUNDS or scenario in contender(method).scenarios
    }
    rows = told["rows"]
    assert sorted((row["scenario"], row["method"]) for row in rows) == sorted(wanted)
    for row in rows:
        assert 0 <= row["acc_dr"] <= 100
        assert row["seconds"] >= 0
        assert row.get("frozen_entries_moved") in (None, 0)
    assert told["setting"]["recipe"]["name"] == "fast"
    assert str(tmp_path) not in json.dumps(told)
    assert "| **deepclean** | 1 |" in said
    case = Case(setup("smoke", cache=tmp_path / "cache"), "class", 0)
    assert cell_file(case, "deepclean").exists()
