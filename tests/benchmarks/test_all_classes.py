"""The benchmark over all classes: its rows, its summary, and going on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import numpy as np

def cifar10(split):
    random = np.random.default_rng(split == "train")
    labels = np.arange(120) % 10
    images = random.integers(0, 80, (120, 32, 32, 3)) + 17 * labels[:, None, None, None]
    return images.astype(np.uint8), labels
"""


def run(folder: Path, output: Path, *words: str) -> str:
    """What the benchmark prints; warnings of the tiny set are not the point."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "all_classes.py"),
        "--data-dir",
        str(folder),
    ]
    command += ["--checkpoint", str(folder / "net.th"), "--output", str(output), "--epochs", "1"]
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, *words], capture_output=True, text=True, env=path)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_rows_summary_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a method or class is missing, a cell is done twice, the worst class is the best, or
    a path of this machine is written down."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from cifar10 import resnet20

    (tmp_path / "load.py").write_text(LOAD)
    torch.manual_seed(0)
    torch.save(resnet20().state_dict(), tmp_path / "net.th")
    output = tmp_path / "rows.json"
    methods = ["original", "assd", "projection-all", "deepclean", "fine-tune"]
    run(tmp_path, output, "--classes", "0", "--methods", *methods[:2])
    first = json.loads(output.read_text())["rows"]
    run(tmp_path, output, "--classes", "0", "3", "--methods", *methods)
    told = json.loads(output.read_text())
    assert told["rows"][:2] == first
    cells = {(row["method"], row["forgotten_class"]) for row in told["rows"]}
    assert cells == {(m, c) for m in methods for c in (0, 3)}
    assert len(told["rows"]) == 10
    own = [row["retain_accuracy"] for row in told["rows"] if row["method"] == "deepclean"]
    assert told["summary"]["deepclean"]["retain_accuracy"]["worst"] == min(own)
    own = [row["forget_accuracy"] for row in told["rows"] if row["method"] == "deepclean"]
    assert told["summary"]["deepclean"]["forget_accuracy"]["worst"] == max(own)
    assert str(tmp_path) not in output.read_text()
    randomly = tmp_path / "random.json"
    run(tmp_path, randomly, "--scenario", "random", "--methods", "assd", "projection")
    rows = json.loads(randomly.read_text())["rows"]
    assert [(row["method"], row["forgotten_class"]) for row in rows] == [("assd", None)]
