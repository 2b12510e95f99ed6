"""`deepclean-hooks forget` under kill -9: the original stands, no half file, the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from deepclean_hooks.__main__ import main
from deepclean_hooks.integrations import stored_training
from deepclean_hooks.stored import sealed
from lab import pictures
from lab.kills import Writes, forked

KILLS = 8


def broken(out: Path) -> list[str]:
    """The files under their final names that cannot be read as what they are."""
    found = []
    for path in out.glob("[!.]*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.name == "run.deepclean":
                sealed.opened(sealed.read(path), str(path))
            elif path.name == "net.pth.tar":
                torch.load(path, weights_only=True)
            else:
                assert path.read_text(encoding="utf-8").endswith(("\n", "</html>"))
        except Exception as reason:
            found.append(f"{path}: {reason}")
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_killed_at_a_random_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a kill leaves half a file or touches the original, or if the same command then ends
    in other bits."""
    monkeypatch.setattr(stored_training, "SECONDS", 0.0)
    given = ["forget", *pictures.case(tmp_path), "--method", "DeepClean(gamma=1.1)"]
    original = (tmp_path / "net.pth.tar").read_bytes()

    def run(out: Path, at: int | None = None) -> None:
        writes = Writes(out, at)
        assert main([*given, "--epochs", "2", "--output", str(out)]) == 0
        out.with_suffix(".writes").write_text(str(writes.seen))

    whole = tmp_path / "whole"
    assert forked(lambda: run(whole), whole) == 0
    total = int(whole.with_suffix(".writes").read_text())
    bits = (whole / "net.pth.tar").read_bytes()
    assert total > KILLS
    for at in sorted(random.Random(5).sample(range(1, total + 1), KILLS)):
        out = tmp_path / f"killed{at}"
        assert forked(lambda f=out, k=at: run(f, k), out) == signal.SIGKILL
        assert broken(out) == [], f"after a kill at write {at}"
        assert forked(lambda f=out: run(f), out) == 0, out.with_suffix(".log").read_text()
        assert (out / "net.pth.tar").read_bytes() == bits, f"after a kill at write {at}"
        assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
        assert (tmp_path / "net.pth.tar").read_bytes() == original
