"""The plain loop: a block, or start and finish; report folders; optimizers; forgotten finishes."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepclean_hooks as deepclean
from lab.hooks import hooks_of_torch, hooks_on
from lab.processes import in_child, launch
from lab.training import FORGET, METHOD, RETAIN, bits_of, moved, same_bits, timm_network

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the reset entries are dead", "ignore:no optimizer step of this model was seen"
)


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    """After every test, whatever it did, torch's global hook registries are as before."""
    before = hooks_of_torch()
    yield
    gc.collect()
    assert hooks_of_torch() == before


def around(model: nn.Module, **options: Any) -> Any:
    """`unlearning` without scores."""
    settings = {"method": METHOD, "scores": False, "progress": False, **options}
    return deepclean.unlearning(model, **{"forget": FORGET, "retain": RETAIN, **settings})


def loop(model: nn.Module, optimizer: Any = None, steps: int = 3) -> None:
    """An ordinary loop over the retain set."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    images, labels = RETAIN.tensors
    for _ in range(steps):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_start_and_finish_are_the_block(tmp_path: Path) -> None:
    """Fails if the form without a block ends in other bits, leaves hooks or writes no report."""
    inside, started = timm_network(), timm_network()
    with around(inside, folder=tmp_path / "block"):
        loop(inside)
    run = around(started, folder=tmp_path / "started").start()
    loop(started)
    report = run.finish()
    assert same_bits(bits_of(inside), bits_of(started))
    assert hooks_on(started) == hooks_on(timm_network())
    assert report.frozen_entries_moved == 0
    for name in ("block", "started"):
        stored = json.loads((tmp_path / name / "report.json").read_text())
        assert stored["phase"] == "finished"
        assert stored["model_after"] == report.model_after
        assert (tmp_path / name / "report.txt").is_file()


def test_a_run_starts_once() -> None:
    """Fails if a second start() ends in an AttributeError."""
    given = around(timm_network())
    run = given.start()
    with pytest.raises(RuntimeError, match=r"start\(\) was called already; call finish\(\)"):
        given.start()
    run.close()


def test_a_run_that_is_dropped_lets_go_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a forgotten `finish` leaves the model held, or nobody is told."""
    model = timm_network()
    run = around(model).start()
    assert hooks_on(model) != hooks_on(timm_network())
    kept = [run]
    del run
    with pytest.warns(ResourceWarning, match=r"dropped before run\.finish"):
        kept.clear()
    assert "was dropped before run.finish()" in caplog.text
    assert hooks_on(model) == hooks_on(timm_network())
    with around(model):  # nobody holds it
        pass


def test_a_run_that_was_closed_or_finished_is_silent() -> None:
    """Fails if leaving a run on purpose warns (warnings are errors in these tests)."""
    for end in ("close", "finish"):
        run = around(timm_network()).start()
        loop(run.model)
        getattr(run, end)()
        del run
        gc.collect()


def test_unlearning_without_a_block_or_start_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a call that does nothing is taken for unlearning."""
    with pytest.warns(ResourceWarning, match="by itself does nothing"):
        around(timm_network())
    assert "by itself does nothing" in caplog.text


def test_a_program_that_ends_without_finish_says_so() -> None:
    """Fails if a script whose `finish` was forgotten ends without a word, or one that finished is
    taken for it."""
    code = (
        "import test_loop as t\n"
        "forgotten, finished = t.timm_network(), t.timm_network()\n"
        "runs = [t.around(model).start() for model in (forgotten, finished)]\n"
        "t.loop(forgotten)\n"
        "t.loop(finished)\n"
        "runs[1].finish()\n"
    )
    ran = in_child("-c", code, folder=HERE)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("the program ended before run.finish()") == 1


class Plain:
    """An optimizer in shape only: decays every weight, is none of torch's, and steps unseen."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]
        self.state: dict[Any, Any] = {}

    def step(self) -> None:
        """One step of gradient descent with decay."""
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.99).sub_(parameter.grad, alpha=0.1)

    def zero_grad(self) -> None:
        """No gradients."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


class PerTensor(Plain):
    """Such an optimizer with a step for each group, as fastai's stepper functions."""

    def step(self) -> None:
        """Signs only."""
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(parameter.grad.sign(), alpha=-0.01).add_(1e-3)


@pytest.mark.parametrize("below", ["", "reports"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_reset(
    below: str, tmp_path: Path
) -> None:
    """Fails if a file in the place of the folder is met when the model is reset already."""
    (tmp_path / "file").write_text("")
    model = timm_network()
    before = bits_of(model)
    with pytest.raises(OSError, match=r"for the reports cannot be made.*pass another as folder="):
        around(model, folder=tmp_path / "file" / below).start()
    assert same_bits(before, bits_of(model))


class Forgetful(Plain):
    """Such an optimizer that remembers nothing, and has no state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        del self.state


@pytest.mark.parametrize("given", [object(), Forgetful([]).step, torch.optim.Optimizer])
def test_what_is_no_optimizer_is_refused_before_the_reset(given: Any) -> None:
    """Fails if it comes out as an AttributeError, from a model that is reset already."""
    model = timm_network()
    before = bits_of(model)
    with pytest.raises(TypeError, match=r"\w+ in optimizers= lacks .*param_groups"):
        around(model, optimizers=(given,)).start()
    assert same_bits(before, bits_of(model))


@pytest.mark.parametrize("kind", [Plain, PerTensor, Forgetful])
def test_optimizers_that_are_not_torchs_are_held(kind: type[Plain]) -> None:
    """Fails if `optimizers=` does not put frozen entries back after the steps of an optimizer that
    torch's hooks do not see."""
    model = timm_network()
    then = bits_of(model)
    optimizer = kind(model.parameters())
    with around(model, optimizers=[optimizer]) as run:
        loop(model, optimizer)
    frozen_moved, free_moved = moved(model, then, run.free)
    assert run.report.frozen_entries_moved == frozen_moved == 0
    assert run.report.optimizer_steps == 3
    assert free_moved > 0


def test_an_average_is_held_on_request() -> None:
    """Fails if an average that a loop writes itself cannot be held: it rounds frozen entries."""
    for hold in (False, True):
        model = timm_network()
        average: dict[str, Tensor] = {}
        run = around(model).start()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(8):
            loop(model, optimizer, steps=1)
            for name, p in model.named_parameters():
                old = average.get(name, p.detach().clone())
                average[name] = 0.9 * old + (1 - 0.9) * p.detach()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(average[name])
        if hold:
            run.hold()
            assert run.finish().frozen_entries_moved == 0
        else:
            with pytest.raises(deepclean.GuardError, match=r"call hold\(\)"):
                run.finish()


def test_report_that_cannot_be_written_leaves_the_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a full disk destroys the report that stands there."""
    model = timm_network()
    with around(model, folder=tmp_path) as run:
        loop(model)
    good = (tmp_path / "report.json").read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run.write_report()
    assert (tmp_path / "report.json").read_text() == good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.txt"]


def test_unknown_options_are_named() -> None:
    """Fails if a misspelt option is taken silently by a loop or by `unlearn`."""
    with pytest.raises(TypeError, match="unlearning has no option 'golds'"):
        around(timm_network(), golds=1)
    with pytest.raises(TypeError, match="unlearn has no option 'golds'"):
        deepclean.unlearn(timm_network(), FORGET, RETAIN, method=METHOD, golds=1)


DIFFERENT: dict[str, dict[str, Any]] = {
    "resume": {"resume": {"free": {}}},
    "scores": {"scores": True},
    "test": {"test": RETAIN},
    "norm_statistics": {"norm_statistics": "freeze"},
}


def begin_differently() -> None:
    """On one of two ranks: settings that the other does not have, one after the other."""
    torch.distributed.init_process_group("gloo")
    for what, own in DIFFERENT.items():
        block = around(timm_network(), **(own if torch.distributed.get_rank() else {}))
        with pytest.raises(RuntimeError, match="differs between ranks"), block:
            pass
        print("refused", what)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_begin_differently_are_refused() -> None:
    """Fails if an option on one rank only leaves the other waiting, or passes."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_loop as t\n"
    for said in launch("-W", "ignore", "-c", code + "t.begin_differently()"):
        assert said.split() == [word for what in DIFFERENT for word in ("refused", what)]
