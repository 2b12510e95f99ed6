"""The Trainer callback's checkpoints: resumed to the same bits, or refused with the way out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import deepclean_hooks as deepclean
from deepclean_hooks.integrations import trainer as adapter
from deepclean_hooks.stored import sealed
from deepclean_hooks.stored.sealed import BrokenRun
from lab.processes import in_child
from lab.training import (
    ADDITIVE,
    METHOD,
    MODELS,
    SAVING,
    TEST,
    Cut,
    CutAt,
    bits_of,
    callback,
    same_bits,
    timm_vit,
    trainer,
)

HERE = Path(__file__).resolve().parent
# The networks are so small that resetting 40 % of them cuts some weights off.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of the reset entries are dead"),
    pytest.mark.usefixtures("optimizer_hooks_as_before"),
]


def cut_run(folder: Path, name: str, step: int = 4) -> None:
    """A run that saved a checkpoint after 3 steps and was cut after `step`."""
    one = trainer(folder, MODELS[name](), callback(), **SAVING)
    one.add_callback(CutAt(step))
    with pytest.raises(Cut):
        one.train()


@pytest.mark.parametrize(
    ("name", "restore"),
    [("transformers", False), ("transformers", True), ("timm", False), ("convolutional", False)],
)
def test_resumed_ends_in_the_same_bits(name: str, restore: bool, tmp_path: Path) -> None:
    """Fails if a resumed run measures or resets again, or trains on partly loaded weights."""
    uninterrupted = MODELS[name]()
    trainer(tmp_path / "whole", uninterrupted, callback()).train()
    cut_run(tmp_path / "cut", name)
    resumed = MODELS[name]()
    # Without any data set: nothing is measured.
    run = deepclean.DeepCleanCallback(method=METHOD, scores=False)
    options = {**SAVING, "restore_callback_states_from_checkpoint": restore}
    trainer(tmp_path / "cut", resumed, run, **options).train(resume_from_checkpoint=True)
    assert same_bits(bits_of(uninterrupted), bits_of(resumed))
    assert run.report.frozen_entries_moved == 0
    assert run.report.forget_samples == 13


def test_resume_from_a_folder_that_was_moved(tmp_path: Path) -> None:
    """Fails if the masks are looked for where the checkpoint once was."""
    cut_run(tmp_path / "cut", "timm")
    moved_to = (tmp_path / "cut" / "checkpoint-3").rename(tmp_path / "elsewhere")
    uninterrupted, resumed = timm_vit(), timm_vit()
    trainer(tmp_path / "whole", uninterrupted, callback()).train()
    trainer(tmp_path / "new", resumed, callback()).train(resume_from_checkpoint=str(moved_to))
    assert same_bits(bits_of(uninterrupted), bits_of(resumed))


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def _alter_mask(path: Path) -> None:
    stored = sealed.read(path)
    next(iter(stored["run"]["free"].values()))[0] ^= 1
    torch.save(stored, path)


def _alter_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = path.with_name("model.safetensors")
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_remove, "is missing"),
        (_truncate, "is damaged"),
        (_alter_mask, "was altered"),
        (_alter_weight, "are not those that were saved"),
    ],
)
def test_broken_checkpoints_are_refused(harm: Any, said: str, tmp_path: Path) -> None:
    """Fails if a run goes on with other masks or weights than were stored."""
    name = "transformers" if harm is _alter_weight else "timm"  # the one that can be repaired
    cut_run(tmp_path, name)
    harm(tmp_path / "checkpoint-3" / adapter.FILE)
    one = trainer(tmp_path, MODELS[name](), callback(), **SAVING)
    with pytest.raises(BrokenRun, match=f"{said}.*Take another checkpoint"):
        one.train(resume_from_checkpoint=True)


def test_another_gamma_is_refused_on_resume(tmp_path: Path) -> None:
    """Fails if a run is resumed under a method that it was not begun with."""
    cut_run(tmp_path, "timm")
    other = callback(method=deepclean.DeepClean(gamma=3.0))
    with pytest.raises(ValueError, match="the stored run used"):
        trainer(tmp_path, timm_vit(), other, **SAVING).train(resume_from_checkpoint=True)


class WorseAndWorse(Trainer):
    """The first evaluation is the best one."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The step as the loss."""
        found = super().evaluate(*args, **kwargs)
        found["eval_loss"] = float(self.state.global_step)
        return found


@pytest.mark.parametrize("name", ["transformers", "timm"])
def test_best_model_is_loaded_whole(name: str, tmp_path: Path) -> None:
    """Fails if load_best_model_at_end leaves weights of the last step among those of the best."""
    model = MODELS[name]()
    options = {**SAVING, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    run = callback()
    one = trainer(tmp_path, model, run, WorseAndWorse, {"eval_dataset": TEST}, **options)
    one.train()
    assert one.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    at_best = MODELS[name]()
    # The schedule of 6 steps, cut after the third.
    stopped = trainer(tmp_path / "short", at_best, callback())
    stopped.add_callback(CutAt(3))
    with pytest.raises(Cut):
        stopped.train()
    assert same_bits(bits_of(model), bits_of(at_best))
    assert run.report.frozen_entries_moved == 0


def test_checkpoints_from_before_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails if nobody is told that older checkpoints still hold what was forgotten."""
    trainer(tmp_path, timm_vit(), max_steps=3, save_strategy="steps", save_steps=3).train()
    trainer(tmp_path, timm_vit(), callback(), max_steps=1).train()
    assert f"hold what is to be forgotten, weights and optimizer.pt: {tmp_path}" in caplog.text


def test_a_term_goes_on_in_a_resumed_training(tmp_path: Path) -> None:
    """Fails if a checkpoint leaves the targets out, they are computed anew from the half-trained
    model, or the forget batches begin again with the first."""
    ends = []
    method = ADDITIVE["ReferenceGuided, W_f"]
    options = {"save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "sequential"}
    for folder, stored in (("whole", None), ("again", tmp_path / "whole" / "checkpoint-3")):
        model = timm_vit()
        one = trainer(tmp_path / folder, model, callback(method=method, batch_size=5), **options)
        one.train(resume_from_checkpoint=None if stored is None else str(stored))
        ends.append(bits_of(model))
    assert same_bits(*ends)


def test_the_run_is_in_a_checkpoint_before_an_older_one_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if with save_total_limit=1 there is a moment without a checkpoint that can be resumed:
    8 of 30 kills fell into it."""
    import transformers.trainer as theirs

    complete: list[list[str]] = []
    rotate = theirs.rotate_checkpoints

    def watched(*args: Any, **kwargs: Any) -> None:
        paths = sorted(tmp_path.glob(f"checkpoint-*/{adapter.FILE}"))
        whole = [p for p in paths if p.with_name("trainer_state.json").is_file()]
        complete.append([p.parent.name for p in whole])
        rotate(*args, **kwargs)

    monkeypatch.setattr(theirs, "rotate_checkpoints", watched)
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer(tmp_path, timm_vit(), callback(), **options).train()
    assert complete == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
    ]


@pytest.mark.parametrize("named", [True, False])
def test_checkpoint_cut_by_a_kill_is_refused_with_the_one_to_take(
    named: bool, tmp_path: Path
) -> None:
    """Fails if a folder without its last file is taken up: the Trainer then starts at step 0, and
    the weights that have forgotten would be measured and reset as the original's."""
    one = trainer(tmp_path, timm_vit(), callback(), save_strategy="steps", save_steps=2)
    one.train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    again = trainer(tmp_path, timm_vit(), callback())
    with pytest.raises(BrokenRun, match=r"was cut.*resume_from_checkpoint='.*checkpoint-4'"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if named else True)
    again = trainer(tmp_path, timm_vit(), callback())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def killed_trainer(folder: str, name: str, mode: str) -> None:
    """In a process of its own: trains whole, is killed after step 5, or resumes; saves the bits."""

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    model = MODELS[name]()
    one = trainer(Path(folder) / mode.replace("resume", "kill"), model, callback(), **SAVING)
    if mode == "kill":
        one.add_callback(Kill())
    one.train(resume_from_checkpoint=mode == "resume" or None)
    torch.save(model.state_dict(), Path(folder) / f"{mode}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_killed_and_resumed(name: str, tmp_path: Path) -> None:
    """Fails if a run killed by SIGKILL and resumed ends in other bits than one left alone."""
    codes = {}
    for mode in ("whole", "kill", "resume"):
        call = f"killed_trainer({str(tmp_path)!r}, {name!r}, {mode!r})"
        code = f"import test_trainer_checkpoints as t; t.{call}"
        ran = in_child("-c", code, folder=HERE)
        codes[mode] = ran.returncode
        assert ran.returncode == (-signal.SIGKILL if mode == "kill" else 0), ran.stderr
    ends = {m: torch.load(tmp_path / f"{m}.pt", weights_only=True) for m in ("whole", "resume")}
    assert same_bits(ends["whole"], ends["resume"])
