"""`torchrun -m deepclean_hooks forget`: the processes share the work and write once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepclean_hooks.__main__ import main
from lab import pictures
from lab.processes import launch


@pytest.mark.slow
def test_two_processes_select_what_one_selects(tmp_path: Path) -> None:
    """Fails if a sample is measured twice, both processes write, or the end is cut off."""
    given = [
        "forget",
        *pictures.case(tmp_path),
        "--method",
        "DeepClean(gamma=1.1)",
        "--epochs",
        "1",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*given, "--output", str(one)]) == 0
    first, second = launch("-m", "deepclean_hooks", *given, "--output", str(two))
    assert "unlearned model: " in first
    assert second == ""
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    alone, shared = (json.loads((out / "report.json").read_text()) for out in (one, two))
    assert (shared["forget_samples"], shared["retain_samples"]) == (2, 22)
    assert shared["frozen_entries_moved"] == 0
    assert shared["selected_entries"] == pytest.approx(alone["selected_entries"], rel=1e-3)
    before = torch.load(tmp_path / "net.pth.tar", weights_only=True)["state_dict"]
    after = torch.load(two / "net.pth.tar", weights_only=True)["state_dict"]
    assert before.keys() == after.keys()
