"""The commands beside `forget`, on real files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepclean_hooks.__main__ import main
from deepclean_hooks.measure.fisher import FisherDiagonal
from deepclean_hooks.methods.named import table
from lab import pictures

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("case")
    pictures.case(made)
    pictures.write(made / "test", each=4, seed=1)
    torch.save(pictures.weights(2), made / "gold.pth")
    return made


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command on the case; what it says on standard output."""
    monkeypatch.chdir(folder)
    source = ["--model", pictures.MODEL, "--weights", "net.pth.tar", "--data", "train"]

    def run(command: str, *options: str) -> str:
        assert main([command, *source, *pictures.COMMON, *options]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_stored_measurement_saves_the_pass(run: Run, tmp_path: Path, folder: Path) -> None:
    """Fails if `forget --measured` selects other weights, or reads the retain set to select."""
    path = tmp_path / "d.safetensors"
    assert "24 samples measured" in run("measure", "--output", str(path))
    assert FisherDiagonal.load(path).count == 24
    common = ["--forget", "delete.txt", "--method", "DeepClean(gamma=1.5)", "--epochs", "1"]
    common += ["--no-scores", "--output"]
    run("forget", *common, str(tmp_path / "plain"))
    run("forget", *common, str(tmp_path / "stored"), "--measured", str(path))
    plain, stored = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("plain", "stored")
    )
    assert plain["selected_entries"] == pytest.approx(stored["selected_entries"], rel=1e-3)
    assert (stored["forget_samples"], stored["retain_samples"]) == (2, 22)
    shutil.copytree(folder / "train", tmp_path / "train")
    for kept in (tmp_path / "train" / "cat").iterdir():
        kept.write_text("no picture")
    damaged = ["--forget", "delete.txt", "--data", str(tmp_path / "train"), "--dry-run"]
    damaged += ["--output", str(tmp_path / "dry")]
    assert "nothing was written" in run("forget", *damaged, "--measured", str(path))
    with pytest.raises(AssertionError):
        run("forget", *damaged)


def test_dry_run_writes_nothing(run: Run, folder: Path) -> None:
    """Fails if a dry run leaves a file, or does not say what it would select and cost."""
    before = set(folder.rglob("*"))
    told = run(
        "forget", "--forget", "delete.txt", "--dry-run", "--output", "out",
        "--method", "DeepClean(gamma=1.5)",
    )  # fmt: skip
    assert "would train 9 steps of 8 samples" in told
    assert "03.png" in told
    assert "where I_Df > 1.5 * I_Dr" in told
    assert set(folder.rglob("*")) == before


def test_sweep(run: Run, tmp_path: Path) -> None:
    """Fails if a gamma is left out, or a larger one selects more."""
    path = tmp_path / "sweep.json"
    given = ["--forget-class", "ant", "--gammas", "1.5", "3", "--output", str(path)]
    told = run("sweep", *given, "--no-scores")
    assert told.count("gamma ") == 2
    low, high = json.loads(path.read_text())["points"]
    assert (low["gamma"], high["gamma"]) == (1.5, 3.0)
    assert low["selected_entries"] > high["selected_entries"]


@pytest.mark.slow
def test_evaluate_beside_golds(run: Run, tmp_path: Path) -> None:
    """Fails if the gold's weights are not those that the figures are compared with."""
    path = tmp_path / "scores.json"
    given = ["--forget-class", "ant", "--test", "test", "--gold", "gold.pth", "--output", str(path)]
    run("evaluate", *given)
    found = json.loads(path.read_text())
    assert found["sets"]["test"]["count"] == 12
    assert found["gold"]["sets"]["forget"]["count"] == 8
    assert found["gold"]["figures"]["forget.loss"] != found["figures"]["forget.loss"]


@pytest.mark.slow
def test_compare_puts_methods_side_by_side(run: Run, tmp_path: Path) -> None:
    """Fails if a method is missing on the page, or begins from what another has left."""
    methods = ["FineTune", "DeepClean(gamma=1.5)"]
    given = ["--forget-class", "ant", "--epochs", "1", "--output", str(tmp_path / "out")]
    run("compare", *given, "--methods", *methods)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert all(method in page for method in methods)
    reports = [json.loads(p.read_text()) for p in sorted((tmp_path / "out").glob("*/report.json"))]
    assert [each["method"] for each in reports] == ["fine-tune", "deepclean"]
    assert reports[0]["model_before"] == reports[1]["model_before"]


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a method cannot be found by its name, its settings or its source."""
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{name}(" in f"\n{told}" for name in table())
    assert "SSD(alpha=10.0, " in told
    assert main(["methods", "--name", "SSD"]) == 0
    assert "Source: " in capsys.readouterr().out


def test_config_of_a_command_line_is_the_same_command(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if --print-config loses an option, or the command line does not prevail."""
    text = run(
        "forget", "--forget", "delete.txt", "--lr", "0.5", "--output", "out", "--print-config"
    )
    assert not Path("out").exists()
    (tmp_path / "run.yaml").write_text(text)
    config = ["forget", "--config", str(tmp_path / "run.yaml")]
    assert main([*config, "--print-config"]) == 0
    assert capsys.readouterr().out == text
    assert main([*config, "--lr", "0.25", "--print-config"]) == 0
    assert capsys.readouterr().out == text.replace("lr: 0.5", "lr: 0.25")


@pytest.mark.parametrize("command", ["forget", "measure", "sweep", "compare", "evaluate"])
def test_help_says_what_every_option_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the help of a command cannot be printed."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "--weights" in capsys.readouterr().out
