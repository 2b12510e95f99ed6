"""Faults in every adapter: aborts at random operations, kills at random writes.

DEEPCLEAN_ABORTS and DEEPCLEAN_KILLS say how many of each an adapter gets.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import deepclean_hooks as deepclean
from deepclean_hooks.stored import sealed
from deepclean_hooks.stored.files import written_whole
from lab.faults import Scene, aborted, points
from lab.kills import Writes, forked
from lab.training import FORGET, METHOD, RETAIN, bits_of, callback, same_bits, trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that Lightning imports
    lightning = pytest.importorskip("lightning.pytorch")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ABORTS = int(os.environ.get("DEEPCLEAN_ABORTS", "6"))
KILLS = int(os.environ.get("DEEPCLEAN_KILLS", "6"))
STEPS, EVERY = 6, 2  # optimizer steps of a run, and between its checkpoints
SETTINGS = {"method": METHOD, "scores": False, "progress": False}


def network() -> nn.Module:
    """Logits of the images; BatchNorm in eval mode beside layers in train mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
    )
    model[1].eval()
    return model


def classifier() -> nn.Module:
    return deepclean.ImageClassifier(network())


class Module(lightning.LightningModule):
    """The network as a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def loader(batch_size: int = 5) -> DataLoader[Any]:
    """37 samples in order; the iterator's seed comes from a generator of its own."""
    return DataLoader(RETAIN, batch_size, generator=torch.Generator())


# ---------------------------------------------------------------------------- the four loops
# Each trains a model to the end in a folder, from the newest whole checkpoint there, if any.


def newest(folder: Path, pattern: str, whole: Callable[[Path], bool]) -> Path | None:
    paths = [path for path in folder.glob(pattern) if whole(path)]
    return max(paths, key=lambda path: int(path.stem.rpartition("-")[2]), default=None)


def plain(model: nn.Module, folder: Path) -> None:
    """A loop of one's own, whose checkpoint is written as README.md shows."""
    optimizer, path = adamw(model), folder / "checkpoint.pt"
    first, resume = 0, None
    if path.is_file():
        stored = torch.load(path, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        first, resume = stored["step"], stored["run"]
    with deepclean.unlearning(
        model, forget=FORGET, retain=RETAIN, resume=resume, folder=folder, **SETTINGS
    ) as run:
        for step, (images, labels) in enumerate(loader(), 1):
            if first < step <= STEPS:
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                if step % EVERY == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    state = {**state, "run": run.state_dict(), "step": step}
                    torch.save(state, folder / "checkpoint.new")
                    os.replace(folder / "checkpoint.new", path)


def on_accelerate(model: nn.Module, folder: Path) -> None:
    """A loop on Accelerate; a folder gets its name when all of it is there."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, adamw(model))
    hook = deepclean.DeepCleanHook(
        accelerator, model, forget=FORGET, retain=RETAIN, folder=folder, **SETTINGS
    )
    last = newest(folder, "state-*", lambda path: path.is_dir())
    if last is not None:
        accelerator.load_state(str(last))
    first = 0 if last is None else int(last.name.rpartition("-")[2])
    with hook:
        for step, (images, labels) in enumerate(loader(), 1):
            if first < step <= STEPS:
                accelerator.backward(F.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
                if step % EVERY == 0:
                    shutil.rmtree(folder / "writing", ignore_errors=True)
                    accelerator.save_state(str(folder / "writing"))
                    os.replace(folder / "writing", folder / f"state-{step}")


def in_a_trainer(model: nn.Module, folder: Path) -> None:
    """The Trainer, which keeps a single checkpoint."""
    # Whole epochs: with max_steps a Trainer that had them all takes another when it is resumed.
    one = trainer(
        folder,
        model,
        callback(**SETTINGS),
        max_steps=-1,
        num_train_epochs=STEPS // EVERY,
        per_device_train_batch_size=20,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=1,
        logging_strategy="no",
    )
    last = newest(folder, "checkpoint-*", complete)
    one.train(resume_from_checkpoint=None if last is None else str(last))


def complete(path: Path) -> bool:
    """Whether a Trainer's checkpoint is whole, by the file that is written last."""
    try:
        json.loads((path / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def in_lightning(model: nn.Module, folder: Path) -> None:
    """Lightning's Trainer, which keeps a single checkpoint."""
    # Of whole epochs: within one, Lightning goes on from the first batch again.
    saving = lightning.callbacks.ModelCheckpoint(folder, "at-{step}", save_top_k=1)
    run = deepclean.DeepCleanLightningCallback(FORGET, **SETTINGS)
    fit = lightning.Trainer(
        default_root_dir=str(folder),
        accelerator="cpu",
        max_epochs=STEPS // EVERY,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[run, saving],
    )
    last = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
    fit.fit(model, loader(20), ckpt_path=last, weights_only=False)  # EVERY batches an epoch


LOOPS: dict[str, tuple[Callable[[nn.Module, Path], None], Callable[[], nn.Module]]] = {
    "plain": (plain, network),
    "accelerate": (on_accelerate, network),
    "trainer": (in_a_trainer, classifier),
    "lightning": (in_lightning, Module),
}
# What a loop changes for itself, with or without us: it sets modes, draws an order, wraps forward.
THEIRS = {
    "plain": (),
    "accelerate": ("attributes", "random: "),
    "trainer": (": mode", "attributes", "random: "),
    "lightning": (": mode", "attributes", "random: "),
}


def broken_files(folder: Path) -> list[str]:
    """The files of ours, under their final names, that cannot be read."""
    broken = []
    for path in [*folder.rglob("*")]:
        try:
            if path.name == "report.json":
                json.loads(path.read_text())
            elif path.name == "report.txt":
                assert path.read_text().rstrip()
            elif path.name == "deepclean.pt" and complete(path.parent):
                sealed.opened(sealed.read(path), str(path))
            elif path.name == "checkpoint.pt" or path.suffix == ".ckpt":
                torch.load(path, weights_only=False)  # written by this test
        except Exception as error:
            broken.append(f"{path}: {error}")
    return broken


# ---------------------------------------------------------------------------- aborts


@pytest.mark.parametrize("name", LOOPS)
def test_aborted_at_a_random_operation(name: str, tmp_path: Path) -> None:
    """Fails if an error anywhere in a run leaves a hook, a mode, a random state, a switch of
    torch's or half a file behind."""
    loop, make_model = LOOPS[name]
    count = 0

    def make() -> Scene:
        nonlocal count
        count += 1
        model, folder = make_model(), tmp_path / str(count)
        folder.mkdir()

        def check() -> None:
            assert broken_files(folder) == []
            assert list(folder.rglob("*.deepclean-partial")) == []

        return Scene(model, lambda: loop(model, folder), check=check)

    for at in points(make, ABORTS, seed=11):
        # An error of the machine: for others in its probes the engine has another way.
        left = aborted(make, at, MemoryError)
        ours = [what for what in left if not any(word in what for word in THEIRS[name])]
        assert ours == [], f"after an abort at operation {at}"


# ---------------------------------------------------------------------------- kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.parametrize("name", LOOPS)
def test_killed_at_a_random_write(name: str, tmp_path: Path) -> None:
    """Fails if a kill leaves half a file under a final name, no checkpoint where there was a whole
    one, or a run that ends in other bits when it is taken up again."""
    loop, make_model = LOOPS[name]

    def run(folder: Path, at: int | None = None) -> None:
        writes, model = Writes(folder, at), make_model()
        loop(model, folder)
        torch.save(bits_of(model), folder.with_suffix(".bits"))
        folder.with_suffix(".writes").write_text(str(writes.seen))

    def bits(folder: Path) -> dict[str, Tensor]:
        state: dict[str, Tensor] = torch.load(folder.with_suffix(".bits"), weights_only=True)
        return state

    def told(folder: Path) -> str:
        return folder.with_suffix(".log").read_text()

    whole = tmp_path / "whole"
    whole.mkdir()
    assert forked(lambda: run(whole), whole) == 0, told(whole)
    total = int(whole.with_suffix(".writes").read_text())
    for at in sorted(random.Random(7).sample(range(1, total + 1), min(KILLS, total))):
        folder = tmp_path / f"killed{at}"
        folder.mkdir()
        assert forked(lambda f=folder, k=at: run(f, k), folder) == signal.SIGKILL, told(folder)
        assert broken_files(folder) == [], f"after a kill at write {at}"
        checkpoints = list(folder.glob("checkpoint-*"))
        if len(checkpoints) > 1:
            assert any(map(complete, checkpoints)), f"after a kill at write {at}"
        assert forked(lambda f=folder: run(f), folder) == 0, told(folder)
        assert same_bits(bits(whole), bits(folder)), f"after a kill at write {at}"
        assert json.loads((folder / "report.json").read_text())["phase"] == "finished"
        assert list(folder.glob("*.deepclean-partial")) == []


def test_the_kill_is_seen_where_it_does_harm(tmp_path: Path) -> None:
    """The opposite: a checkpoint written in place is cut by such a kill, the helper's is not."""

    def write(folder: Path, *, in_place: bool) -> None:
        path = folder / "checkpoint.pt"
        torch.save({"step": 1}, path)
        Writes(folder, 1 if in_place else 2)
        if in_place:
            with open(path, "wb") as file:
                file.write(b"half")
                file.flush()
                torch.save({"step": 2}, file)
        else:
            with written_whole(path) as temporary:
                torch.save({"step": 2}, temporary)

    for in_place in (True, False):
        folder = tmp_path / str(in_place)
        folder.mkdir()
        status = forked(lambda f=folder, p=in_place: write(f, in_place=p), folder)
        assert status == signal.SIGKILL
        path = folder / "checkpoint.pt"
        assert torch.load(path, weights_only=True) == {"step": 1}
