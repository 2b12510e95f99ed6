"""`verify` believes no altered report and no other model, and refuses no honest file.

Each honest form of a file has beside it an altered one that must fail.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deepclean_hooks as deepclean
from deepclean_hooks.__main__ import main
from deepclean_hooks.report import stored_report
from deepclean_hooks.report.check import Check
from deepclean_hooks.report.verify import unvouched, verify
from deepclean_hooks.stored import checkpoint
from lab.planted import FORGET, RETAIN, gold, original
from lab.reported import Tied, unlearned

# Runs without a loop of their own are enough here.
pytestmark = pytest.mark.filterwarnings("ignore:no optimizer step of this model")

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with report.json and the checkpoints before and after, of a model with BatchNorm."""
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    model = Tied()
    torch.save(model.state_dict(), folder / "before.pt")
    told = unlearned(model)
    (folder / "report.json").write_text(told.to_json(), encoding="utf-8")
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "after.pt")
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(wrapped, folder / "wrapped.pt")
    once = {n: v.contiguous() for n, v in model.state_dict().items() if not n.startswith("first")}
    save_file(once, folder / "after.safetensors")
    return folder


@pytest.mark.parametrize("name", ["after.pt", "wrapped.pt", "after.safetensors"])
def test_verify_accepts_the_model_of_the_report(
    stored: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a checkpoint of the very model is refused: wrapped, nested, or with a tied tensor
    stored once, and without the buffer that no checkpoint holds."""
    given = [str(stored / "report.json"), str(stored / name)]
    assert main(["verify", *given]) == 0
    assert main(["verify", *given, "--original", str(stored / "before.pt")]) == 0
    told = capsys.readouterr().out
    assert " checks hold, 1 skipped" in told  # without the original what changed is not known
    assert re.search(r"\d+ checks hold$", told.strip())


def test_verify_refuses_an_unfinished_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if what the Trainer writes before it trains passes for any model."""
    run = deepclean.Session(Tied(), deepclean.DeepClean(gamma=1.2), scores=False)
    run.measure(FORGET, RETAIN).select()
    run.reset()
    (tmp_path / "report.json").write_text(run.report.to_json(), encoding="utf-8")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "any.pt")
    assert main(["verify", str(tmp_path / "report.json"), str(tmp_path / "any.pt")]) == 1
    told = capsys.readouterr().out
    assert "MISMATCH the run is finished: reset" in told
    assert "MISMATCH tensors of the unlearned model: the report has no digests of them" in told


def test_verify_reads_a_tied_tensor_under_either_name(stored: Path) -> None:
    """Fails if a tied weight that was reset counts as one that nobody may touch, or an altered one
    passes because its other name is unchanged."""
    told = json.loads((stored / "report.json").read_text(encoding="utf-8"))
    before, after = (torch.load(stored / f"{n}.pt", weights_only=True) for n in ("before", "after"))
    after = after["model"]
    del before["again.weight"], after["first.weight"]
    assert all(check.right for check in verify(told, after, before))
    after["again.weight"].view(-1)[0] += 1
    assert not all(check.right for check in verify(told, after, before))


def altered_weight(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    after["head.weight"].view(-1)[0] += 1e-6


def missing_tensor(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    del after["head.bias"]


def other_tensor(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    after["adapter.weight"] = torch.ones(2)


def fewer_selected(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["selected_entries"] -= 1


def better_fraction(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["selected_fraction"] *= 0.9


def fewer_forgotten(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["forgotten"]["hashes"].pop()


def nicer_layer(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    largest = max(report["layers"], key=lambda layer: layer["selected"])
    other = next(one for one in report["layers"] if one is not largest)
    moved = largest["selected"]
    largest["selected"], other["selected"] = 0, other["selected"] + moved


def freer_layer(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["layers"][0]["may_change"] = report["layers"][0]["entries"]


def other_schema(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["schema"] = 99


def moved_entry(report: dict[str, Any], after: dict[str, torch.Tensor]) -> None:
    report["frozen_entries_moved"] = 3


ALTERATIONS = [
    altered_weight,
    missing_tensor,
    other_tensor,
    fewer_selected,
    better_fraction,
    fewer_forgotten,
    nicer_layer,
    freer_layer,
    other_schema,
    moved_entry,
]


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
def test_verify_refuses_what_was_altered(
    stored: Path, tmp_path: Path, alter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a report or a model that was touched afterwards passes."""
    told = json.loads((stored / "report.json").read_text(encoding="utf-8"))
    state = torch.load(stored / "after.pt", weights_only=True)["model"]
    alter(told, state)
    (tmp_path / "report.json").write_text(json.dumps(resealed(told)), encoding="utf-8")
    torch.save(state, tmp_path / "after.pt")
    given = [str(tmp_path / "report.json"), str(tmp_path / "after.pt")]
    assert main(["verify", *given, "--original", str(stored / "before.pt")]) == 1
    assert "MISMATCH" in capsys.readouterr().out


def test_verify_recomputes_gaps(report: deepclean.Report) -> None:
    """Fails if a figure of the final scores can be made nicer without its gap."""
    told = json.loads(report.to_json())
    state = copy.deepcopy(original()).state_dict()

    def gaps() -> bool | None:
        checks = {check.what: check.right for check in verify(told, state)}
        return checks["gaps are figure minus gold"]

    assert gaps()
    told["scores"]["after"]["figures"]["forget.accuracy"] -= 10
    assert gaps() is False


def test_verify_names_what_it_cannot_read(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a missing or damaged file ends in a traceback or in exit status 0."""
    given = str(stored / "report.json")
    assert main(["verify", given, str(tmp_path / "none.pt")]) == 2
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    assert main(["verify", given, str(tmp_path / "bad.pt")]) == 2
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    assert main(["verify", str(tmp_path / "list.json"), str(stored / "after.pt")]) == 2
    (tmp_path / "torn.json").write_text("{", encoding="utf-8")
    assert main(["verify", str(tmp_path / "torn.json"), str(stored / "after.pt")]) == 2
    told = capsys.readouterr()
    assert told.err.count("cannot verify") == 4
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert main(["verify", given, str(tmp_path / "empty.pt")]) == 2
    assert "holds no state_dict" in capsys.readouterr().err


# ------------------------------------------------------------------ what a file can be


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its report as a dict, and the model's state before and after."""

    told: dict[str, Any]
    before: State
    after: State


def finished(model: nn.Module, **options: Any) -> Run:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = unlearned(model, scores=False, **options)
    return Run(json.loads(report.to_json()), before, dict(model.state_dict()))


@pytest.fixture(scope="module")
def run() -> Run:
    torch.manual_seed(0)
    return finished(Tied())


def wrong(checks: list[Check]) -> list[str]:
    return [str(check) for check in checks if check.right is False]


def resealed(told: dict[str, Any]) -> dict[str, Any]:
    """The report as someone leaves it who edits it with care."""
    return {**told, "digest": stored_report.digest(told)}


def renamed(state: State, change: Callable[[str], str]) -> State:
    return {change(name): value for name, value in state.items()}


def changed(state: State) -> State:
    """The same state with one entry of one weight another."""
    altered = {name: value.clone() for name, value in state.items()}
    altered["head.weight"].view(-1)[3] += 1
    return altered


class Epoch:
    """A class of a training script, which no reader has."""

    def __init__(self) -> None:
        self.number = 3


def namespace() -> argparse.Namespace:
    return argparse.Namespace(lr=0.1, folder=Path("data"), device=torch.device("cpu"))


CONTAINERS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "net": lambda s: {"net": s, "acc": 91.2, "epoch": 7},
    "DistributedDataParallel": lambda s: {"state_dict": renamed(s, "module.{}".format)},
    "Lightning": lambda s: {"state_dict": renamed(s, "model.{}".format), "global_step": 4},
    "Fabric": lambda s: {"model": renamed(s, "_forward_module.{}".format)},
    "compiled": lambda s: renamed(s, "_orig_mod.{}".format),
    "a block compiled": lambda s: renamed(s, lambda n: n.replace("head", "head._orig_mod")),
    "DDP of compiled": lambda s: renamed(s, "module._orig_mod.{}".format),
    "torchvision": lambda s: {"model": s, "optimizer": {}, "epoch": 2, "args": namespace()},
    "timm": lambda s: {"state_dict": s, "arch": "x", "args": namespace(), "metric": 81.3},
    "a class of the script": lambda s: {"weights": {"of": s}, "at": Epoch()},
    "a list of rounds": lambda s: [{"round": 1, "model": s}],
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_state_dict_is_seen_in_any_container(run: Run, tmp_path: Path, name: str) -> None:
    """Fails if an honest file of everyday scripts is a mismatch or cannot be read, or an altered
    one in the same container passes."""
    for state, right in ((run.after, True), (changed(run.after), False)):
        torch.save(CONTAINERS[name](state), tmp_path / "c.pt")
        checks = verify(run.told, checkpoint.read(tmp_path / "c.pt"), run.before)
        assert (not wrong(checks)) == right, wrong(checks)
        assert "tensors of the unlearned model" in wrong(checks)[0] if not right else True


SECOND: dict[str, Callable[[State, State], Any]] = {
    "beside it": lambda s, b: {"model": s, "state_dict": b},
    "an average": lambda s, b: {"state_dict": s, "state_dict_ema": renamed(b, "module.{}".format)},
    "under other names": lambda s, b: {"model": s, "best": renamed(b, "backbone.{}".format)},
    "in an optimizer": lambda s, b: {"model": s, "optimizer": {"state": {0: {"master": b}}}},
    "in a list": lambda s, b: {"model": s, "history": [list(b.values())]},
    "in an object": lambda s, b: {"model": s, "args": argparse.Namespace(best=b)},
}


@pytest.mark.parametrize("name", SECOND)
def test_the_original_is_seen_wherever_it_lies(run: Run, tmp_path: Path, name: str) -> None:
    """Fails if a file passes that holds the unlearned model where verify looks, and the original
    where a loader looks."""
    torch.save(SECOND[name](run.after, run.before), tmp_path / "c.pt")
    lines = wrong(verify(run.told, checkpoint.read(tmp_path / "c.pt")))
    assert any("weights of the original in the file" in line for line in lines)
    torch.save(SECOND[name](run.after, run.after), tmp_path / "c.pt")
    assert not wrong(verify(run.told, checkpoint.read(tmp_path / "c.pt")))


def test_an_average_is_another_model_unless_one_is_named(run: Run) -> None:
    """Fails if an average that the report says nothing of passes, or cannot be left out."""
    average = {n: (v + run.before[n]) / 2 for n, v in run.after.items() if v.is_floating_point()}
    file = {"state_dict": run.after, "state_dict_ema": average}
    assert any("under 'state_dict_ema'" in line for line in wrong(verify(run.told, file)))
    assert not wrong(verify(run.told, file, state="state_dict"))
    with pytest.raises(ValueError, match="no state_dict stands under 'ema'; there are"):
        verify(run.told, file, state="ema")


def test_optimizers_and_stored_runs_are_no_models(run: Run) -> None:
    """Fails if a momentum of zeros, or masks under the names of weights, count as a model."""
    zeros = {name: torch.zeros_like(value) for name, value in run.after.items()}
    masks = {name: torch.zeros(3, dtype=torch.uint8) for name in run.after}
    file = {"model": run.after, "optimizer": {"exp_avg": zeros}, "run": {"free": masks}}
    assert not wrong(verify(run.told, file))


def test_tensors_of_any_kind_may_lie_beside_the_model(run: Run, tmp_path: Path) -> None:
    """Fails if a dtype or layout that cannot be compared ends the command."""
    other = {
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "sparse": torch.eye(3).to_sparse(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
    }
    torch.save({"model": run.after, "other": list(other.values())}, tmp_path / "c.pt")
    assert not wrong(verify(run.told, checkpoint.read(tmp_path / "c.pt")))


class Planted:
    """Runs code in whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Builtin(Planted):
    """The same through a function that no list of modules names."""

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.path)!r}, 'w')",)


def test_a_module_stored_whole_is_read_without_its_class(tmp_path: Path) -> None:
    """Fails if torch.save(model) is a mismatch, or an altered one passes."""
    torch.manual_seed(0)
    model = Tied()
    run = finished(model)
    for file in (model, {"model": model, "epoch": 3}):
        torch.save(file, tmp_path / "c.pt")
        assert not wrong(verify(run.told, checkpoint.read(tmp_path / "c.pt"), run.before))
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    torch.save(model, tmp_path / "c.pt")
    assert wrong(verify(run.told, checkpoint.read(tmp_path / "c.pt"), run.before))


@pytest.mark.parametrize("kind", [Planted, Builtin])
def test_no_code_of_a_file_runs(run: Run, tmp_path: Path, kind: type[Planted]) -> None:
    """Fails if reading what torch refuses means running it."""
    torch.save({"model": run.after, "args": kind(tmp_path / "ran")}, tmp_path / "c.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(kind(tmp_path / "ran")))
    for name in ("c.pt", "old.pt"):
        try:
            checks = verify(run.told, checkpoint.read(tmp_path / name))
            assert not wrong(checks)
        except ValueError as reason:
            assert "cannot be read" in str(reason)  # noqa: PT017
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------ what is missing


def test_a_tensor_is_not_there_because_another_has_its_content() -> None:
    """Fails if a checkpoint that lacks a layer passes, since its content stands elsewhere: fresh
    normalisation layers, biases of zeros."""
    torch.manual_seed(0)
    layers = [nn.Linear(30, 10), nn.BatchNorm1d(10), nn.Linear(10, 10), nn.BatchNorm1d(10)]
    with torch.no_grad():
        layers[0].bias.zero_()
        layers[2].bias.zero_()
    model = nn.Sequential(*layers)
    method = deepclean.DeepClean(gamma=1.2)
    with deepclean.unlearning(
        model, forget=FORGET, retain=RETAIN, method=method, scores=False
    ) as run:
        pass
    told, state = json.loads(run.report.to_json()), dict(model.state_dict())
    assert not wrong(verify(told, state))
    for names in (("3.weight",), ("3.running_mean",), ("2.bias",), ("3.num_batches_tracked",)):
        part = {name: value for name, value in state.items() if name not in names}
        lines = wrong(verify(told, part))
        assert any(f"1 missing in the checkpoint: {names[0]}" in line for line in lines)


class Adapted(nn.Module):
    """A frozen network with an adapter and a head, the names as PEFT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(30, 30).requires_grad_(False)
        self.norm = nn.BatchNorm1d(30).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(30, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 30, bias=False)})
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(30, 10)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.base_layer(x)) + self.lora_B["default"](self.lora_A["default"](x))
        return self.modules_to_save["default"](torch.relu(x))


def test_a_file_of_an_adapter_is_compared_in_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an adapter's file is a mismatch for the weights that it is not meant to hold, passes
    without a word of these, or lacks a part of what was trained unseen."""
    torch.manual_seed(0)
    run = finished(Adapted(), norm_statistics="freeze")
    trained = {n: v for n, v in run.after.items() if "default" in n}
    adapter = renamed(trained, lambda n: f"base_model.model.{n.replace('.default', '')}")
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "report.json").write_text(json.dumps(run.told), encoding="utf-8")
    assert main(["verify", str(tmp_path / "report.json"), str(tmp_path)]) == 0  # the folder
    out = capsys.readouterr().out
    assert "skipped  tensors of the unlearned model: the file lacks 7 tensors" in out
    assert "base_layer.weight" in out
    torn = {n: v for n, v in adapter.items() if "lora_B" not in n}
    assert "missing" in "".join(wrong(verify(run.told, torn)))
    whole = {n: v for n, v in run.after.items() if "running" not in n and "batches" not in n}
    assert "missing" in "".join(wrong(verify(run.told, whole)))  # buffers are no frozen network
    more = {**adapter, "norm.weight": run.after["norm.weight"]}
    assert "missing" in "".join(wrong(verify(run.told, more)))


# ------------------------------------------------------------------ what became of W_f


class Half(nn.Module):
    """The planted network with weights of a dtype, which takes and gives float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = copy.deepcopy(original()).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(next(self.parameters()).dtype)).float()


def test_restored_weights_are_seen() -> None:
    """Fails if a "best model" that is the original passes, whole or in one layer, in half precision
    too, or a trained W_f is a false alarm."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        run = finished(Half(dtype))
        what = "W_f is not what it was before"
        assert not wrong(verify(run.told, run.after, run.before))
        for names in (set(run.after), {"net.0.weight"}):
            state = {n: run.before[n] if n in names else v for n, v in run.after.items()}
            told = dict(run.told)
            told["checkpoint_after"] = checkpoint.digests(state)  # as the session would have told
            checks = {check.what: check for check in verify(told, state, run.before)}
            assert checks[what].right is False
            assert "net.0.weight" in checks[what].seen
        assert checks["changed weights"].right


# ------------------------------------------------------------------ forged and malformed reports

FORGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "digest before": lambda r: r.update(model_before="0" * 64),
    "digest after": lambda r: r.update(model_after=r["model_before"]),
    "hashes repeated": lambda r: r["forgotten"].update(hashes=r["forgotten"]["hashes"][:1] * 150),
    "hashes cut": lambda r: r["forgotten"].update(
        hashes=[value[:12] for value in r["forgotten"]["hashes"]]
    ),
    "copies counted": lambda r: r["forgotten"].update(
        hashes=r["forgotten"]["hashes"][:1], repeated={r["forgotten"]["hashes"][1]: 150}
    ),
    "W_f back": lambda r: r.update(restored_entries=r["selected_entries"]),
    "negative selection": lambda r: r["layers"][0].update(selected=-1),
    "a layer twice": lambda r: r["layers"].append(dict(r["layers"][0], entries=0, selected=0)),
    "a layer of none": lambda r: r["layers"].append(
        {"name": "x", "entries": 0, "selected": 0, "dead": 0, "held_back": 0, "may_change": 0}
    ),
    "tied to another": lambda r: r["tied"].update({"head.bias": "norm.bias"}),
    "a digest left out": lambda r: r["checkpoint_after"].pop("head.bias"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_figures_are_seen(run: Run, name: str) -> None:
    """Fails if a figure that follows from others can be made another."""
    told = copy.deepcopy(run.told)
    FORGED[name](told)
    assert wrong(verify(resealed(told), run.after))


def test_copies_of_one_sample_have_one_hash_and_a_count() -> None:
    """Fails if an honest request with duplicates is a mismatch."""
    double = torch.utils.data.ConcatDataset([FORGET, torch.utils.data.Subset(FORGET, [0, 0, 1])])
    with deepclean.unlearning(
        model := copy.deepcopy(original()),
        forget=double,
        retain=RETAIN,
        method=deepclean.DeepClean(gamma=1.2),
        scores=False,
    ) as run:
        pass
    told = json.loads(run.report.to_json())
    assert sorted(told["forgotten"]["repeated"].values()) == [2, 3]
    assert told["forget_samples"] == len(double) == len(told["forgotten"]["hashes"]) + 3
    assert not wrong(verify(told, model.state_dict()))


VALUES = [None, [], {}, "x", True, -1, 1.5, [1], {"x": 1}, 10**400]


def damaged(told: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The report with each field, and each field of its parts, replaced by what is none."""
    parts = {
        "": lambda r: r,
        "layers": lambda r: r["layers"][0],
        "forgotten": lambda r: r["forgotten"],
        "scores": lambda r: r["scores"],
        "after": lambda r: r["scores"]["after"],
        "attack": lambda r: r["scores"]["after"]["attacks"]["rmia"],
        "sets": lambda r: r["scores"]["after"]["sets"],
        "gold": lambda r: r["scores"]["after"]["gold"],
    }
    for part, at in parts.items():
        for name in at(told):
            for value in VALUES:
                altered = copy.deepcopy(told)
                at(altered)[name] = value
                yield f"{part}.{name} = {str(value)[:20]}", altered
            altered = copy.deepcopy(told)
            del at(altered)[name]
            yield f"{part}.{name} left out", altered


@pytest.mark.slow
def test_malformed_reports_end_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a field of another type ends in a traceback, on the page or in verify."""
    scored = unlearned(copy.deepcopy(original()), gold=gold())
    told = json.loads(dataclasses.replace(scored, **_digests(run)).to_json())
    monkeypatch.setattr(checkpoint, "read", lambda path: run.after)
    monkeypatch.chdir(tmp_path)  # pages go there
    refused, accepted, codes = 0, 0, set()
    for what, report in damaged(told):
        try:
            stored_report.checked(report)
            accepted += 1
        except ValueError:
            refused += 1
        # A ValueError is one line, as those that are tried show; of the rest every third is.
        if refused % 20 and accepted % 3:
            continue
        monkeypatch.setattr(stored_report, "load", lambda path, report=report: report)
        for command in (["verify", "r.json", "c.pt"], ["page", "r.json"]):
            code = main(command)
            codes.add(code)
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == (code == 2), (what, lines)
            assert all(len(line) < 500 for line in lines)
    assert refused > 400
    assert codes == {0, 1, 2}


def _digests(run: Run) -> dict[str, Any]:
    names = ("checkpoint_before", "checkpoint_after", "model_before", "model_after", "tied")
    return {name: run.told[name] for name in names}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{", b"[" * 100_000, b'{"schema": 3, "schema": 3}'],
    ids=["empty", "torn", "list", "null", "bytes", "deep", "twice"],
)
def test_what_is_no_report_ends_in_one_line(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if bytes that are no JSON, or JSON with a field twice, end in a traceback or pass."""
    (tmp_path / "r.json").write_bytes(content)
    for command in (
        ["verify", str(tmp_path / "r.json"), "c.pt"],
        ["page", str(tmp_path / "r.json")],
    ):
        assert main(command) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------------ the terminal

TRICKS = [
    "\x1b[2J\x1b[Hok       all tensors\n12 checks hold\n\x1b[8m",
    "\r ok  everything",
    "\u202egnihtyreve\u202c",
    "a\u2028b\x9b31m\x07",
    "\ud800" + "long" * 2000,
]


@pytest.mark.parametrize("trick", TRICKS, ids=range(len(TRICKS)))
def test_names_of_a_file_are_text_on_the_terminal(
    run: Run, tmp_path: Path, trick: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a name in a file or a word of a report moves the cursor, begins a line or turns the
    reading order."""
    told = copy.deepcopy(run.told)
    told["phase"], told["layers"][0]["name"] = trick, trick
    text = json.dumps(resealed(told))
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    torch.save({**run.after, "\x1b[2J": torch.zeros(1)}, tmp_path / "c.pt")
    if "\ud800" not in trick:
        torch.save({**run.after, trick: torch.zeros(1)}, tmp_path / "c.pt")
    assert main(["verify", str(tmp_path / "r.json"), str(tmp_path / "c.pt")]) == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    assert all(re.match(r"(ok|MISMATCH|skipped) |nothing here|\d+ of \d+", line) for line in lines)


def test_a_terminal_without_the_letters_gets_them_escaped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a name in another script ends in UnicodeEncodeError."""
    (tmp_path / "r.json").write_text(json.dumps({**run.told, "phase": "\u00fc\u4e2d"}), "utf-8")
    torch.save(run.after, tmp_path / "c.pt")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["verify", str(tmp_path / "r.json"), str(tmp_path / "c.pt")]) == 1
    stream.flush()
    assert b"the run is finished: \\xfc\\u4e2d" in stream.buffer.getvalue()  # type: ignore[attr-defined]


# ------------------------------------------------------------------ schema 2, the page, the rest


def as_schema_2(told: dict[str, Any]) -> dict[str, Any]:
    """What a report of today would have been in schema 2."""
    old = copy.deepcopy(told)
    old["schema"] = 2
    del old["tied"], old["withheld"], old["digest"]
    forgotten = old["forgotten"]
    for value, count in forgotten.pop("repeated").items():
        forgotten["hashes"] += [value] * (count - 1)
    return old


def test_schema_2_still_verifies(run: Run) -> None:
    """Fails if a report of the version before is refused, or a forged one of it passes."""
    old = as_schema_2(run.told)
    once = {n: v for n, v in run.after.items() if not n.startswith("again")}
    for state in (run.after, once):
        assert not wrong(verify(old, state, run.before))
    assert wrong(verify(old, changed(run.after)))
    assert wrong(verify(old, {n: v for n, v in run.after.items() if n != "norm.running_mean"}))
    old["selected_entries"] += 1
    assert wrong(verify(old, run.after))


def test_nothing_vouches_for_the_rest(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a field that could be altered unseen is not listed, or one is that could not."""
    listed = unvouched(run.told)
    for name, value in (
        ("method", "none"),
        ("settings", {"gamma": 9}),
        ("warnings", ["x"]),
        ("retain_samples", 5),
        ("versions", {}),
        ("criterion", "x"),
    ):
        assert name in listed
        edited = {**run.told, name: value}
        assert not wrong(verify(resealed(edited), run.after))
        assert "digest of the report" in "".join(wrong(verify(edited, run.after)))
    assert not {"checkpoint_after", "model_after", "layers", "selected_entries"} & set(listed)


def test_the_page_of_a_stored_report(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the command's page differs from the report's own, or a committed report of schema 2
    has none."""
    report = unlearned(copy.deepcopy(original()))
    (tmp_path / "report.json").write_text(report.to_json(), encoding="utf-8")
    assert main(["page", str(tmp_path / "report.json")]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.to_html()
    edited = {**json.loads(report.to_json()), "method": "better"}
    (tmp_path / "report.json").write_text(json.dumps(edited), encoding="utf-8")
    assert main(["page", str(tmp_path / "report.json")]) == 0
    assert "was damaged or edited" in (tmp_path / "report.html").read_text(encoding="utf-8")
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    for name in ("cifar10_class", "cifar10_random"):
        told = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["report"]
        (tmp_path / "old.json").write_text(json.dumps(told), encoding="utf-8")
        assert main(["page", str(tmp_path / "old.json"), "--output", str(tmp_path / "p")]) == 0
        text = (tmp_path / "p").read_text(encoding="utf-8")
        for words in ("Called training data (entropy)", "KLoM", "How sure the model is"):
            assert words in text
    assert not list(tmp_path.glob(".*"))  # no temporary file is left
