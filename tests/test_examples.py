"""The examples run as a reader runs them, at a reduced size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab import pictures
from lab.processes import ROOT, environment, in_child

ROWS = ["original", "gold", "zeroed only", "DeepClean", "fine-tune"]


def test_forget_digits_forgets(tmp_path: Path) -> None:
    """Fails if the example does not run on a fresh install, a row is missing, or nothing is
    forgotten."""
    written = tmp_path / "rows.json"
    script = ROOT / "examples" / "forget_digits.py"
    words = ["--epochs", "3", "--tune", "1", "--json", str(written)]
    ran = in_child(str(script), *words)  # the checkout stands in for an install
    assert ran.returncode == 0, ran.stderr
    scenarios = json.loads(written.read_text(encoding="utf-8"))
    assert len(scenarios) == 2
    for title, rows in scenarios.items():
        assert title in ran.stdout
        assert [row["model"] for row in rows] == ROWS
        for name in ROWS:
            assert sum(line.startswith(f"{name} ") for line in ran.stdout.splitlines()) == 2
    by_class = {row["model"]: row for row in next(iter(scenarios.values()))}
    assert by_class["original"]["forget"] > 90
    assert by_class["DeepClean"]["forget"] < 10
    assert by_class["DeepClean"]["retain"] > by_class["zeroed only"]["retain"] - 5
    assert by_class["DeepClean"]["moved"] == 0


@pytest.mark.slow
def test_forget_folder(tmp_path: Path) -> None:
    """Fails if the shell script does not unlearn, or its verification does not hold."""
    pictures.case(tmp_path)
    given = ["net.pth.tar", "train", "delete.txt", "out", *pictures.COMMON, "--epochs", "1"]
    script = str(ROOT / "examples" / "forget_folder.sh")
    ran = subprocess.run(
        ["bash", script, pictures.MODEL, *given],
        cwd=tmp_path,
        env=environment(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert "checks hold" in ran.stdout
    assert (tmp_path / "out" / "net.pth.tar").is_file()
