"""Bad input: one line that names the thing and the way out, exit code 2, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepclean_hooks.__main__ import main
from lab import pictures

Spoil = Callable[[Path], Any]


def text(name: str, content: str) -> Spoil:
    """A text file in the folder of the case."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    return write


def stored(name: str, content: Callable[[], Any]) -> Spoil:
    """A file of torch.save in the folder of the case."""
    return lambda folder: torch.save(content(), folder / name)


def table(content: str) -> tuple[Spoil, dict[str, Any]]:
    """A CSV file in the folder, as the training data."""
    return text("table.csv", content), {"data": "table.csv"}


def nothing(folder: Path) -> None:
    """For a case whose command line is all that is bad."""


def module() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))


HALF = dict(list(pictures.weights().items())[:10])
ORDER = [("ant", "10"), ("bee", "9"), ("cat", "1")]
ONE = "train/ant/00.png,ant\n"

# What spoils the folder; the options that differ, None to leave an option out; what the line says.
CASES: dict[str, tuple[Spoil, dict[str, Any], str]] = {
    "no model": (nothing, {"model": None}, "--model is missing; --help says what to give"),
    "no data": (nothing, {"data": None}, "--data is missing"),
    "no output": (nothing, {"output": None}, "--output is missing"),
    "unknown option": (nothing, {"epoch": 3}, "no option --epoch; close are --epochs"),
    "epochs in words": (nothing, {"epochs": "two"}, "--epochs is a whole number, got 'two'"),
    "no epochs": (nothing, {"epochs": 0}, "--epochs must be at least 1, got 0"),
    "learning rate": (nothing, {"lr": -1}, "--lr must be above 0, got -1.0"),
    "optimizer": (nothing, {"optimizer": "lion"}, "--optimizer is one of adam, sgd, got 'lion'"),
    "no config": (nothing, {"config": "run.yaml"}, "run.yaml: No such file"),
    "broken config": (text("run.yaml", "lr: 1\nx: ["), {"config": "run.yaml"}, "run.yaml, line 2"),
    "config of a list": (text("run.yaml", "- 1"), {"config": "run.yaml"}, "write YAML"),
    "unknown in config": (
        text("run.yaml", "ephocs: 1"),
        {"config": "run.yaml"},
        "no option 'ephocs'; close are epochs",
    ),
    "config's type": (
        text("run.yaml", "steps: many"),
        {"config": "run.yaml"},
        "run.yaml: steps is a whole number, got 'many'",
    ),
    "unknown library": (nothing, {"model": "keras:vgg"}, "write timm:NAME"),
    "model without library": (nothing, {"model": "resnet18"}, "write timm:NAME"),
    "unknown model": (nothing, {"model": "timm:resnet1x"}, "close are resnet"),
    "unknown torchvision model": (nothing, {"model": "torchvision:resnet1"}, "close are resnet"),
    "no transformers folder": (nothing, {"model": "hf:nowhere"}, "correct --model"),
    "arguments": (nothing, {"model_args": "{depth: 2"}, "write JSON"),
    "unknown argument": (nothing, {"model_args": '{"x": 2}'}, "correct --model or --model-args"),
    "no weights": (nothing, {"weights": None}, "--weights is missing"),
    "missing weights": (nothing, {"weights": "x.pt"}, "x.pt is no file"),
    "weights of text": (text("x.pt", "hi"), {"weights": "x.pt"}, "cannot be read as a checkpoint"),
    "half the weights": (
        stored("x.pt", lambda: HALF),
        {"weights": "x.pt"},
        "such as conv1.4.running_var; state_dicts there: ''; keys: conv1.0.weight",
    ),
    "two states": (
        stored("x.pt", lambda: {"model": pictures.weights(), "ema": pictures.weights(1)}),
        {"weights": "x.pt"},
        "'model', 'ema'; say which with --state",
    ),
    "unknown state": (nothing, {"state": "ema"}, "no state_dict 'ema'; there are 'state_dict'"),
    "a whole module": (stored("x.pt", module), {"weights": "x.pt"}, "state_dicts there: none"),
    "another head": (
        stored("x.pt", lambda: pictures.weights(classes=7)),
        {"weights": "x.pt"},
        "head has 7 classes and the data have 3; give the data",
    ),
    "function of no model": (nothing, {"model": "os:getcwd"}, "it must return a module"),
    "device": (nothing, {"device": "gpu"}, "--device gpu cannot be used"),
    "size": (nothing, {"size": 0}, "--size must be at least 1"),
    "mean": (nothing, {"mean": [0.5]}, "--mean needs 3 numbers"),
    "no data folder": (nothing, {"data": "nowhere"}, "correct --data"),
    "no class folders": (nothing, {"data": "train/ant"}, "give a folder of class folders"),
    "empty class folder": (
        lambda folder: (folder / "train" / "dog").mkdir(),
        {},
        "dog hold no picture; remove them",
    ),
    "damaged picture": (
        text("train/ant/00.png", "no picture"),
        {},
        "00.png cannot be read as a picture",
    ),
    "no column": (*table(f"file,label\n{ONE}"), "line 1: there is no column 'path' among file"),
    "short row": (*table(f"path,label\n{ONE}x.png\n"), "line 3: 1 fields, 2 in the header"),
    "missing picture": (*table(f"path,label\n{ONE}x.png,bee\n"), "line 3: "),
    "no label": (*table(f"path,label\n{ONE}train/bee/00.png,\n"), "has no label; write one"),
    "no rows": (*table("path,label\n"), "has no rows; write a header"),
    "unknown test class": (
        lambda folder: shutil.copytree(folder / "train" / "ant", folder / "test" / "dog"),
        {"test": "test"},
        "has the class 'dog', which is none of the 3 of the head",
    ),
    "no list": (nothing, {"forget": "gone.txt"}, "gone.txt cannot be read: No such file"),
    "empty list": (text("gone.txt", "\n"), {"forget": "gone.txt"}, "write an entry a line"),
    "unknown file": (
        text("gone.txt", "ant/01.png\nant/99.png\n"),
        {"forget": "gone.txt"},
        "gone.txt, line 2: 'ant/99.png' names no sample",
    ),
    "ambiguous file": (
        text("gone.txt", "\n01.png\n"),
        {"forget": "gone.txt"},
        "gone.txt, line 2: '01.png' names 3 samples",
    ),
    "unknown class": (nothing, {"forget_class": ["bees"]}, "close are ['bee']"),
    "all classes": (nothing, {"forget_class": list(pictures.CLASSES)}, "name some samples"),
    "no columns": (nothing, {"forget_where": ["subject=3"]}, "give a table as --data"),
    "no condition": (nothing, {"forget_where": ["subject"]}, "write COLUMN=VALUE"),
    "nothing to forget": (nothing, {"forget": None}, "say what to forget"),
    "unknown method": (nothing, {"method": "DeepCleen"}, "close are DeepClean"),
    "unknown setting": (nothing, {"method": "SSD(beta=1)"}, "its settings are alpha"),
    "setting": (nothing, {"method": "SSD(alpha=-1)"}, "alpha must be a positive number"),
    "code as method": (nothing, {"method": "SSD(alpha=open('x'))"}, "'open' is no method"),
    "held-out data": (nothing, {"method": "ReferenceGuided"}, "ReferenceGuided needs held_out"),
    "stored measurement": (nothing, {"measured": "d.safetensors"}, "d.safetensors"),
    "output of the original": (nothing, {"output": "."}, "name another folder"),
    "output in use": (
        text("out/x", ""), {"output": "out"}, "out is not empty; name another --output"
    ),
    "output among the data": (nothing, {"output": "train/out"}, "lies within the data"),
    "order of classes": (
        lambda folder: [(folder / "train" / n).rename(folder / "train" / m) for n, m in ORDER],
        {},
        "'10' for torchvision, '9' for timm; name the classes",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    pictures.case(folder)
    return folder


SLOW = {"no transformers folder"}  # imports transformers


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, case in CASES.items()
    ],
)
def test_bad_input_is_told_in_a_line(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Spoil,
    options: dict[str, Any],
    words: str,
) -> None:
    """Fails if bad input ends in a trace, in another exit code, or leaves a file behind."""
    folder = tmp_path / "case"
    shutil.copytree(whole, folder)
    monkeypatch.chdir(folder)
    spoil(folder)
    given = {"model": pictures.MODEL, "weights": "net.pth.tar", "data": "train", "size": 32}
    given |= {"forget": "delete.txt", "output": "out", **options}
    command = ["forget"]
    for name, value in given.items():
        if value is not None:
            several = value if isinstance(value, list) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, several)]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("cannot forget: ")
    assert told.count("\n") == 1, told
    assert words in told
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "required: COMMAND"),
        (["unlearn"], "choose from"),
        (["methods", "--name", "DeepCleen"], "there are"),
        (["measure", "--output", "d.safetensors"], "--model, --data are missing"),
        (["compare", "--data", "x"], "--model, --methods, --output are missing"),
    ],
    ids=["no command", "unknown command", "methods", "measure", "compare"],
)
def test_other_commands_tell_in_a_line(
    capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    """Fails if a command other than forget ends in a trace or another exit code."""
    assert main(command) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1, told
