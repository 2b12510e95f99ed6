"""`deepclean-hooks forget`: real files in, real files out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepclean_hooks.__main__ import main
from lab import pictures

METHOD = ["--method", "DeepClean(gamma=1.1)", "--epochs", "1"]


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run has finished, in the folder `out`."""
    folder = tmp_path_factory.mktemp("forgotten")
    given = pictures.case(folder)
    assert main(["forget", *given, *METHOD, "--output", str(folder / "out")]) == 0
    return folder


def test_forget_writes_what_an_engineer_hands_on(forgotten: Path) -> None:
    """Fails if a paper is missing, a state of the run is left, or the listed samples are others."""
    out = forgotten / "out"
    names = {"report.json", "report.txt", "report.html", "model-card.md", "do-not-use.txt"}
    assert {path.name for path in out.iterdir()} == names | {"request.json", "net.pth.tar"}
    gone = (out / "do-not-use.txt").read_text(encoding="utf-8").split()
    train = forgotten / "train"
    assert gone == [str(train / "ant" / "03.png"), str(train / "bee" / "05.png")]
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["forget_samples"], report["retain_samples"]) == (2, 22)
    assert report["frozen_entries_moved"] == 0
    assert report["phase"] == "finished"


def test_checkpoint_has_the_form_in_which_it_came(forgotten: Path) -> None:
    """Fails if timm cannot load it, nothing changed, or what else the file held comes along."""
    import timm

    before, after = (
        torch.load(path, weights_only=True)
        for path in (forgotten / "net.pth.tar", forgotten / "out" / "net.pth.tar")
    )
    assert after.keys() == {"state_dict"}
    assert after["state_dict"].keys() == before["state_dict"].keys()
    changed = [n for n, v in after["state_dict"].items() if not v.equal(before["state_dict"][n])]
    assert changed
    path = forgotten / "out" / "net.pth.tar"
    loaded = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(path))
    assert all(v.equal(after["state_dict"][f"module.{n}"]) for n, v in loaded.state_dict().items())
    report = str(forgotten / "out" / "report.json")
    assert main(["verify", report, str(path), "--original", str(forgotten / "net.pth.tar")]) == 0


def test_same_command_again_has_nothing_to_do(
    forgotten: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a finished run begins anew, or that of another request is taken for it."""
    out = forgotten / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    given = [*pictures.COMMON, "--model", pictures.MODEL, "--output", str(out), *METHOD]
    given += ["--weights", str(forgotten / "net.pth.tar"), "--data", str(forgotten / "train")]
    assert main(["forget", *given, "--forget", str(forgotten / "delete.txt")]) == 0
    assert "finished before" in capsys.readouterr().out
    assert main(["forget", *given, "--forget-class", "ant"]) == 2
    assert "another request (what to forget differ)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_run_that_selects_nothing_is_no_success(
    forgotten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a script is told that a model has forgotten, of which no weight was reset."""
    given = [*pictures.COMMON, "--model", pictures.MODEL, "--output", str(tmp_path / "out")]
    given += ["--weights", str(forgotten / "net.pth.tar"), "--data", str(forgotten / "train")]
    given += [
        "--forget-class",
        "ant",
        "--method",
        "DeepClean(gamma=1e30, parameters='conv1.0.*')",
        "--no-scores",
    ]
    for _ in range(2):
        assert main(["forget", *given, "--epochs", "1"]) == 1
        assert "NOTHING WAS FORGOTTEN" in capsys.readouterr().out
