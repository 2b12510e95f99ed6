"""Every benchmark is a command, and no file of ours takes the place of somebody else's module."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
# Of the files that were here once, and are modules of packages that may not be installed.
TAKEN = {"requests", "evaluate", "tables"}


@pytest.mark.parametrize("name", [*COMMANDS, "paper_tables.__main__"])
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a benchmark cannot be imported from the root of the checkout, or its help has a
    per cent sign that argparse takes for a format."""
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as raised:
        importlib.import_module(f"benchmarks.{name}").main()
    assert raised.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_no_file_shadows_a_module(folder: str) -> None:
    """Fails if a script of that folder, whose folder comes first on the path, is imported instead
    of a package: `requests.py` instead of requests."""
    known = TAKEN | sys.stdlib_module_names | set(packages_distributions())
    ours = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert not ours & known


def test_no_script_edits_the_path() -> None:
    """Fails if what a benchmark imports depends on which of them was imported before."""
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert "sys.path" not in path.read_text(encoding="utf-8"), path
