"""The Accelerate hook's checkpoints: resumed to the same bits, or refused; no file runs code."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import deepclean_hooks as deepclean
from deepclean_hooks.stored.sealed import BrokenRun
from lab.accelerating import MODELS, adamw, hook, retain_loader, run_all, train
from lab.processes import in_child
from lab.training import (
    Cut,
    bits_of,
    same_bits,
    timm_vit,
)

HERE = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the reset entries are dead", "ignore:no optimizer step of this model was seen"
    ),
    pytest.mark.usefixtures("fresh_accelerate"),
]


def stored_run(folder: Path, name: str, cut: int | None = None, kill: int | None = None) -> Any:
    """A run of 6 steps; `cut`: saved after 3 and left after that step, by SIGKILL after `kill`."""
    accelerator = Accelerator(cpu=True)
    model = MODELS[name]()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    run = hook(accelerator, wrapped)
    with contextlib.suppress(Cut), run:
        for step in train(accelerator, wrapped, optimizer, loader):
            if step == 3 and (cut or kill):
                accelerator.save_state(str(folder))
            if step == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == cut:
                raise Cut
    return model


def resumed_run(folder: Path, name: str, **options: Any) -> Any:
    """Goes on after the third step."""
    accelerator = Accelerator(cpu=True)
    model = MODELS[name]()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    run = hook(accelerator, wrapped, **options)
    accelerator.load_state(str(folder))
    with run as session:
        run_all(accelerator, wrapped, optimizer, loader, first=3)
    assert session.report.frozen_entries_moved == 0
    assert session.report.forget_samples == 13
    accelerator.save_state(str(folder / "after"))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_resumed_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    """Fails if a resumed run measures or resets again."""
    whole = stored_run(tmp_path, name)
    stored_run(tmp_path, name, cut=4)
    assert same_bits(bits_of(whole), bits_of(resumed_run(tmp_path, name)))


def _alter_mask(folder: Path) -> None:
    path = folder / "deepclean.pt"
    stored = torch.load(path, weights_only=True)
    next(iter(stored["run"]["free"].values()))[0] ^= 1
    torch.save(stored, path)


def _alter_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _truncate(folder: Path) -> None:
    path = folder / "deepclean.pt"
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("harm", "error", "said"),
    [
        (_alter_mask, BrokenRun, "was altered"),
        (_alter_weight, BrokenRun, "not those that were saved in .*begin anew"),
        (_truncate, BrokenRun, "is damaged"),
    ],
)
def test_broken_checkpoints_are_refused(
    harm: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    """Fails if a run goes on with other masks or weights than were stored."""
    stored_run(tmp_path, "timm", cut=4)
    harm(tmp_path)
    with pytest.raises(error, match=said):
        resumed_run(tmp_path, "timm")


def test_another_gamma_is_refused_on_resume(tmp_path: Path) -> None:
    """Fails if a run is resumed under a method that it was not begun with."""
    stored_run(tmp_path, "timm", cut=4)
    with pytest.raises(ValueError, match="the stored run used"):
        resumed_run(tmp_path, "timm", method=deepclean.DeepClean(gamma=3.0))


def test_load_state_inside_the_block_is_refused(tmp_path: Path) -> None:
    """Fails if masks are exchanged under a guard that holds others."""
    stored_run(tmp_path, "timm", cut=4)
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, _ = accelerator.prepare(model, adamw(model))
    run = hook(accelerator, wrapped)
    with pytest.raises(RuntimeError, match="before `with"), run:
        accelerator.load_state(str(tmp_path))


def test_state_from_before_the_reset_begins_anew(tmp_path: Path) -> None:
    """Fails if a state saved before anything was reset keeps the hook from measuring."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    run = hook(accelerator, wrapped)
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    with run as session:
        run_all(accelerator, wrapped, optimizer, loader, steps=1)
    assert session.report.selected_entries > 0


def killed(folder: str, name: str, mode: str) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    path = Path(folder) / "state"
    if mode == "resume":
        model = resumed_run(path, name)
    else:
        model = stored_run(path, name, kill=5 if mode == "kill" else None)
    torch.save(model.state_dict(), Path(folder) / f"{mode}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_killed_and_resumed(name: str, tmp_path: Path) -> None:
    """Fails if a run killed by SIGKILL and resumed ends in other bits than one left alone."""
    for mode in ("whole", "kill", "resume"):
        call = f"killed({str(tmp_path)!r}, {name!r}, {mode!r})"
        code = f"import test_accelerator_checkpoints as t; t.{call}"
        ran = in_child("-c", code, folder=HERE)
        assert ran.returncode == (-signal.SIGKILL if mode == "kill" else 0), ran.stderr
    ends = [torch.load(tmp_path / f"{m}.pt", weights_only=True) for m in ("whole", "resume")]
    assert same_bits(*ends)


class Planted:
    """A pickle that leaves a mark when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("code_ran",))


@pytest.mark.parametrize("name", ["deepclean.pt", "custom_checkpoint_0.pkl"])
@pytest.mark.parametrize("when", ["before entering", "by resume", "after the block"])
def test_no_code_of_a_checkpoint_runs(
    name: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a file of ours is read, or one that looks like it is registered, as a pickle."""
    monkeypatch.chdir(tmp_path)
    stored_run(tmp_path / "state", "timm", cut=4)
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, _ = accelerator.prepare(model, adamw(model))
    torch.save(Planted(), tmp_path / "state" / name)
    with contextlib.suppress(RuntimeError, BrokenRun):
        if when == "by resume":
            with hook(accelerator, wrapped, resume=tmp_path / "state"):
                pass
        run = hook(accelerator, wrapped)
        if when == "after the block":
            with run:
                pass
        accelerator.load_state("state")
        with run:
            pass
    assert not (tmp_path / "code_ran").exists()
    torch.load(tmp_path / "state" / name, weights_only=False)
    assert (tmp_path / "code_ran").exists()  # the mark works


def test_starts_from_the_originals_folder_and_resumes_from_its_own(tmp_path: Path) -> None:
    """Fails if a script with the hook made before `load_state` cannot begin from the original
    training's folder, or one that loads before it makes the hook cannot resume."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    accelerator.save_state(str(tmp_path / "original"))
    run = hook(accelerator, wrapped)
    accelerator.load_state(str(tmp_path / "original"))
    with contextlib.suppress(Cut), run:
        for step in train(accelerator, wrapped, optimizer, loader):
            if step == 3:
                accelerator.save_state(str(tmp_path / "stored"))
                raise Cut
    # Another script, which loads first.
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    accelerator.load_state(str(tmp_path / "stored"))
    with hook(accelerator, wrapped, resume=tmp_path / "stored") as session:
        run_all(accelerator, wrapped, optimizer, loader, first=3)
    whole = stored_run(tmp_path / "whole", "timm")
    assert same_bits(bits_of(whole), bits_of(model))
    assert session.report.optimizer_steps == 6
    with pytest.raises(BrokenRun, match="is missing"):
        hook(accelerator, wrapped, resume=tmp_path / "original")


def test_other_objects_of_the_script_are_left_alone(tmp_path: Path) -> None:
    """Fails if our file counts among the objects that a script registers itself."""

    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    for mode in ("store", "resume"):
        accelerator = Accelerator(cpu=True)
        model = timm_vit()
        wrapped, _ = accelerator.prepare(model, adamw(model))
        counter = Counter()
        accelerator.register_for_checkpointing(counter)
        run = hook(accelerator, wrapped)
        if mode == "store":
            counter.count = 7
            with run:
                accelerator.save_state(str(tmp_path))
        else:
            accelerator.load_state(str(tmp_path))
            with run as session:
                pass
            assert counter.count == 7
            assert session.report.phase == "finished"


def test_run_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    """Fails if a folder in which the run is a registered object is taken for the original's."""
    stored_run(tmp_path, "timm", cut=4)
    (tmp_path / "deepclean.pt").rename(tmp_path / "custom_checkpoint_0.pkl")
    with pytest.raises(BrokenRun, match="of an earlier version"):
        resumed_run(tmp_path, "timm")
