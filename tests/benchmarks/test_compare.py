"""Two result files beside each other: which ratios became worse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.lab.results import RESULTS, read

FILES = ("fisher_cpu", "memory_cpu", "guard_cpu", "growth_cpu", "sharded_cpu", "requests_cpu")


def ended(monkeypatch: pytest.MonkeyPatch, old: Path, new: Path, *words: str) -> object:
    monkeypatch.setattr("sys.argv", ["compare", str(old), str(new), *words])
    with pytest.raises(SystemExit) as raised:
        compare.main()
    return raised.value.code


def test_a_regression_is_named_and_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a rise above the limit passes, one below it does not, a fall counts, or rows are
    compared by their place instead of by what they are."""
    old = read(RESULTS / "fisher_cpu.json")
    new = copy.deepcopy(old)
    new["rows"].reverse()
    for row in new["rows"]:
        row["ratio"] *= {"resnet50": 1.10, "vit_tiny": 0.5}.get(row["model"], 1.02)
        row["plain_ms_per_batch"] *= 3  # another machine
    path = tmp_path / "new.json"
    path.write_text(json.dumps(new))
    assert ended(monkeypatch, RESULTS / "fisher_cpu.json", path, "--limit", "0.05") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("model resnet50, image 64, batch 32")
    assert lines[0].endswith("(+10.0%)")
    assert ended(monkeypatch, RESULTS / "fisher_cpu.json", path, "--limit", "0.2") == 0
    assert "0 of" in capsys.readouterr().out


def test_files_without_a_common_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if files that have nothing in common are taken for a good result."""
    path = tmp_path / "new.json"
    path.write_text(json.dumps({"rows": [{"model": "another", "ratio": 1.0}]}))
    assert ended(monkeypatch, RESULTS / "fisher_cpu.json", path) == 2


@pytest.mark.parametrize("name", FILES)
def test_rows_of_a_file_are_told_apart(name: str) -> None:
    """Fails if two rows of a committed file have one name, so that the second hides the first."""
    told: Any = read(RESULTS / f"{name}.json")
    names = [found for found, _ in compare.ratios(told)]
    assert names
    assert len(names) == len(set(names))
