"""The tables' other setting: classes forgotten in turn from a network that was given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.lab.results import read
from benchmarks.paper_tables import __main__ as command_line
from benchmarks.paper_tables.cases import Case
from benchmarks.paper_tables.cells import cell
from benchmarks.paper_tables.collect import over_classes
from benchmarks.paper_tables.models import gold, untrained
from benchmarks.paper_tables.setups import Setup, forgotten_class, setup
from benchmarks.paper_tables.tables import tables


def given(folder: Path) -> Setup:
    """A setup whose original is read from a file, of a network under DataParallel."""
    path = folder / "net.th"
    state = untrained(setup("smoke", cache=folder), 5).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    return setup("smoke", epochs=1, checkpoint=path, cache=folder)


def test_scenarios_by_name() -> None:
    """Fails if a typing error passes for a class, or "class" is no longer the paper's label 0."""
    assert forgotten_class("random") is None
    assert [forgotten_class(name) for name in ("class", "class-0", "class-12")] == [0, 0, 12]
    for wrong in ("class-", "class-x", "random-1", "classes"):
        with pytest.raises(ValueError, match="class-LABEL"):
            forgotten_class(wrong)


def test_original_is_the_checkpoint_and_has_no_gold(tmp_path: Path) -> None:
    """Fails if the weights are trained or drawn anew, a row is compared with a gold of an unknown
    recipe, another class is forgotten, or two checkpoints share a cache."""
    chosen = given(tmp_path)
    case = Case(chosen, "class-3", 0)
    for ours, theirs in zip(
        case.original.model.parameters(), untrained(chosen, 5).parameters(), strict=True
    ):
        assert ours.equal(theirs)
    assert {label.item() for _, label in case.sets.forget} == {3}
    row = cell(case, "original")
    assert (row["scenario"], row["time_ratio"], row["average_gap"]) == ("class-3", None, None)
    with pytest.raises(ValueError, match="recipe is not known"):
        gold(chosen, "class-3", 0)
    plain = setup("smoke", epochs=1, cache=tmp_path)
    other = tmp_path / "other.th"
    torch.save(untrained(plain, 6).state_dict(), other)
    folders = {one.folder for one in (chosen, plain, setup("smoke", epochs=1, checkpoint=other))}
    assert len(folders) == 3


def test_run_over_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a class or a method is missing, a cell is done twice, the whole training set is
    measured again for the second class, the worst class is the best, or a path of this machine is
    written down."""
    monkeypatch.chdir(tmp_path)
    chosen = given(tmp_path)
    methods = ["assd", "deepclean", "class-projection-all"]

    def run(*classes: str) -> dict[str, object]:
        words = ["paper_tables", "--classes", *classes, "--seeds", "0", "--epochs", "1"]
        words += ["--checkpoint", str(chosen.checkpoint), "--cache", str(tmp_path)]
        words += ["--output", str(tmp_path / "rows.json"), "--methods", *methods]
        monkeypatch.setattr("sys.argv", words)
        command_line.main()
        told: dict[str, object] = read(tmp_path / "rows.json")
        return told

    run("0")
    stored = [*chosen.folder.glob("*.safetensors"), *chosen.folder.glob("cells/*_0.json")]
    before = {path: path.stat().st_mtime_ns for path in stored}
    assert [path.name for path in stored if path.suffix != ".json"] == ["fisher_train.safetensors"]
    told = run("0", "3")
    assert {path: path.stat().st_mtime_ns for path in stored} == before
    rows = told["rows"]
    cells = {(row["scenario"], row["method"]) for row in rows}
    expected = {(f"class-{label}", m) for label in (0, 3) for m in ("original", *methods)}
    assert cells == expected | {("random", m) for m in ("original", "assd", "deepclean")}
    of_class = [row for row in rows if row["scenario"] != "random" and row["method"] == "assd"]
    figures = told["over_classes"]["assd"]
    assert figures["cells"] == 2
    assert figures["acc_dr"]["worst"] == min(row["acc_dr"] for row in of_class)
    assert figures["acc_df"]["worst"] == max(row["acc_df"] for row in of_class)
    assert str(tmp_path) not in (tmp_path / "rows.json").read_text()
    assert "--checkpoint net.th --epochs 1 --classes 0 3" in told["command"]
    assert "| assd | 2 |" in capsys.readouterr().out


def test_one_class_alone_has_a_table_of_its_own() -> None:
    """Fails if a single class is averaged over classes, or is shown nowhere."""
    row = {"scenario": "class-7", "method": "original", "seed": 0, "acc_dr": 90.0}
    assert over_classes([row]) == {}
    told = {"summary": {"class-7": {"original": {"seeds": 1, "acc_dr": {"mean": 9, "std": None}}}}}
    assert tables(told).startswith("### Forgetting class 7\n\n| method |")
