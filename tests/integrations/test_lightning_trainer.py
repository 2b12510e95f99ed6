"""The Lightning callback: right masks, held bits, the loop's own result, resume, clean exits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import deepclean_hooks as deepclean
from deepclean_hooks.methods import SSD
from deepclean_hooks.stored import checkpoint
from deepclean_hooks.stored.sealed import BrokenRun
from lab.hooks import hooks_of_torch
from lab.processes import in_child
from lab.training import ADDITIVE, FORGET, METHOD, RETAIN, bits_of, moved, same_bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that Lightning imports
    lightning = pytest.importorskip("lightning.pytorch")

HERE = Path(__file__).resolve().parent
# Lightning warns of loaders, workers and folders; none of that is the point.
pytestmark = pytest.mark.filterwarnings("ignore")


class Classifier(lightning.LightningModule):
    """A small convolutional network with BatchNorm; AdamW with decay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 4)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The mean cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Nothing: the callback logs by itself."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with decay."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    """After every test, whatever it did, torch's global hook registries are as before."""
    before = hooks_of_torch()
    yield
    assert hooks_of_torch() == before


def callback(**options: Any) -> deepclean.DeepCleanLightningCallback:
    """The callback without scores."""
    return deepclean.DeepCleanLightningCallback(
        FORGET, **{"method": METHOD, "scores": False, **options}
    )


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    """On the CPU, clipped, silent; 2 epochs of 8 steps."""
    settings = {
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "gradient_clip_val": 0.5,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**settings, **options})


def loader(data: Any = RETAIN) -> DataLoader:
    """Batches of 5, in order."""
    return DataLoader(data, batch_size=5)


def free_of(run: deepclean.DeepCleanLightningCallback) -> dict[str, Tensor]:
    """The masks that it holds."""
    assert run._run is not None
    return run._run.free


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_masks_and_bits_in_every_configuration(name: str, tmp_path: Path) -> None:
    """Fails if the Trainer's precision or batches enter the measurement, or a frozen bit moves; the
    free entries must train, and without the callback the frozen ones move."""
    model, run = Classifier(), callback()
    reference = deepclean.Session(Classifier(), METHOD, scores=False, batch_size=5)
    reference.measure(FORGET, RETAIN).select()
    then = bits_of(model)
    trainer(tmp_path, run, **CONFIGURATIONS[name]).fit(model, loader())
    free = free_of(run)
    assert all(torch.equal(mask, free[n]) for n, mask in reference.free.items())
    frozen_moved, free_moved = moved(model, then, free)
    assert run.report.frozen_entries_moved == frozen_moved == 0
    assert free_moved > 0
    assert json.loads((tmp_path / "report.json").read_text())["phase"] == "finished"
    plain = Classifier()
    trainer(tmp_path, **CONFIGURATIONS[name]).fit(plain, loader())
    assert moved(plain, then, free)[0] > 0


@pytest.mark.parametrize("name", ["DeepClean", *ADDITIVE])
def test_same_bits_as_the_loop(name: str, tmp_path: Path) -> None:
    """Fails if the same data in the same order end in other bits than in a loop of one's own, with
    a method's term too: Lightning computes the loss in a closure, inside the step."""
    method = {**ADDITIVE, "DeepClean": METHOD, "BadTeaching": deepclean.BadTeaching()}[name]
    model, run = Classifier(), callback(method=method)
    trainer(tmp_path, run).fit(model, loader())
    own = Classifier()
    with deepclean.unlearning(
        own, forget=FORGET, retain=RETAIN, method=method, scores=False, batch_size=5
    ):
        own.train()
        optimizer = own.configure_optimizers()
        for _ in range(2):
            for batch in loader():
                optimizer.zero_grad()
                own.training_step(batch, 0).backward()
                nn.utils.clip_grad_norm_(own.parameters(), 0.5)
                optimizer.step()
    assert same_bits(bits_of(model), bits_of(own))


def test_resumed_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Fails if a resumed run measures or resets again, or a checkpoint without masks, or with
    altered weights, is taken up."""
    whole = Classifier()
    trainer(tmp_path / "whole", callback()).fit(whole, loader())
    first = trainer(tmp_path / "first", callback(), max_epochs=1)
    first.fit(Classifier(), loader())
    first.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    model, run = Classifier(), callback()
    trainer(tmp_path / "second", run).fit(model, loader(), ckpt_path=str(tmp_path / "one.ckpt"))
    assert same_bits(bits_of(model), bits_of(whole))
    assert run.report.frozen_entries_moved == 0
    stored = torch.load(tmp_path / "one.ckpt", weights_only=False)
    entry = stored.pop("deepclean_hooks")
    torch.save(stored, tmp_path / "bare.ckpt")
    with pytest.raises(BrokenRun, match="holds no unlearning run"):
        trainer(tmp_path, callback()).fit(
            Classifier(), loader(), ckpt_path=str(tmp_path / "bare.ckpt")
        )
    stored["deepclean_hooks"] = entry
    stored["state_dict"]["net.0.weight"][0] += 1
    torch.save(stored, tmp_path / "altered.ckpt")
    with pytest.raises(BrokenRun, match="not those that were saved"):
        trainer(tmp_path, callback()).fit(
            Classifier(), loader(), ckpt_path=str(tmp_path / "altered.ckpt")
        )


def test_second_fit_keeps_the_masks(tmp_path: Path) -> None:
    """Fails if fitting on measures the half-trained model again."""
    model, run = Classifier(), callback()
    trainer(tmp_path, run).fit(model, loader())
    free = {name: mask.clone() for name, mask in free_of(run).items()}
    then = bits_of(model)
    trainer(tmp_path, run).fit(model, loader())
    assert all(torch.equal(mask, free[name]) for name, mask in free_of(run).items())
    assert moved(model, then, free)[0] == 0


def test_exception_leaves_no_hook(tmp_path: Path) -> None:
    """Fails if an error in a step leaves a hook on the model (the fixture looks at torch's own)."""

    class Failing(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            if index == 3:
                raise OSError("disk")
            return super().training_step(batch, index)

    model = Failing()
    with pytest.raises(OSError, match="disk"):
        trainer(tmp_path, callback()).fit(model, loader())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_method_that_trains_nothing_ends_the_training(tmp_path: Path) -> None:
    """Fails if a step is taken after a method that only edits."""
    model, run = Classifier(), callback(method=SSD(alpha=1.1))
    fit = trainer(tmp_path, run)
    fit.fit(model, loader())
    assert fit.global_step == 0
    assert run.report.phase == "finished"
    assert run.report.selected_entries


def test_what_is_refused(tmp_path: Path) -> None:
    """Fails if a module without forward() or a strange loader is found out about too late."""

    class Stepping(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(batch[0]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match=r"Stepping has no forward\(\)"):
        trainer(tmp_path, callback()).fit(Stepping(), loader())
    with pytest.raises(TypeError, match="pass retain= and forget= as DataLoaders"):
        trainer(tmp_path, callback()).fit(Classifier(), [loader(), loader()])
    with pytest.raises(RuntimeError, match="no report before"):
        _ = callback().report


def test_forget_accuracy_reaches_the_loggers(tmp_path: Path) -> None:
    """Fails if the figures of the selection or of the forget set are not logged."""
    from lightning.pytorch.loggers import CSVLogger

    log = CSVLogger(str(tmp_path))
    run = callback(scores=True)
    trainer(tmp_path, run, logger=log).fit(Classifier(), loader(), loader(FORGET))
    text = Path(log.experiment.metrics_file_path).read_text()
    for name in ("deepclean_selected_fraction", "deepclean_forget_accuracy"):
        assert name in text


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Fails if under DistributedDataParallel the masks or the held bits are others than in one
    process."""
    code = f"""
import torch
from pathlib import Path
from test_lightning_trainer import Classifier, bits_of, callback, free_of, loader, moved, trainer
model, run = Classifier(), callback()
then = bits_of(model)
fit = trainer(Path({str(tmp_path)!r}), run, devices=2, strategy="ddp", max_epochs=1)
fit.fit(model, loader())
frozen, free = moved(model, then, free_of(run))
assert frozen == run.report.frozen_entries_moved == 0 and free > 0
assert run.report.forget_samples == 13 and run.report.retain_samples == 37
torch.save(free_of(run), f"{tmp_path}/free.{{fit.global_rank}}.pt")
"""
    script = tmp_path / "fit.py"
    script.write_text(code)
    ran = in_child(str(script), folder=HERE)
    assert ran.returncode == 0, ran.stderr
    reference = deepclean.Session(Classifier(), METHOD, scores=False, batch_size=5)
    reference.measure(FORGET, RETAIN).select()
    for rank in (0, 1):
        free = torch.load(tmp_path / f"free.{rank}.pt")
        assert all(torch.equal(mask, free[n]) for n, mask in reference.free.items())


def _averages() -> dict[str, Any]:
    kinds = lightning.callbacks
    made = {"swa": lambda: kinds.StochasticWeightAveraging(1e-2, 1)}
    if hasattr(kinds, "EMAWeightAveraging"):  # Lightning 2.6
        made["ema"] = lambda: kinds.EMAWeightAveraging(decay=0.9)
        made["ema late"] = lambda: kinds.EMAWeightAveraging(decay=0.5, update_starting_at_step=9)
    return made


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("policy", ["update", "freeze"])
@pytest.mark.parametrize("name", _averages())
def test_average_written_at_the_end_is_what_is_reported(
    name: str, policy: str, first: bool, tmp_path: Path
) -> None:
    """Fails if the run ends before the average is written: the report's digest is then of weights
    that nobody has; or if averaging moves a frozen entry or running mean by its rounding."""
    model, run, average = Classifier(), callback(norm_statistics=policy), _averages()[name]()
    then = bits_of(model)
    order = (run, average) if first else (average, run)
    trainer(tmp_path, *order).fit(model, loader())
    assert run.report.phase == "finished"
    assert run.report.model_after == checkpoint.model_digest(model)
    frozen_moved, free_moved = moved(model, then, free_of(run))
    assert run.report.frozen_entries_moved == frozen_moved == 0
    assert free_moved > 0
    same = torch.equal(model.net[1].running_mean, then["net.1.running_mean"])
    assert same == (policy == "freeze")


def test_weights_that_the_module_writes_at_the_end_are_counted(tmp_path: Path) -> None:
    """Fails if what a LightningModule does to frozen weights in its last event goes unseen."""

    class Restoring(Classifier):
        def on_train_end(self) -> None:
            with torch.no_grad():
                self.net[4].weight.add_(1.0)

    run = callback()
    with pytest.raises(deepclean.GuardError, match="frozen entries moved"):
        trainer(tmp_path, run).fit(Restoring(), loader())
    assert run.report.frozen_entries_moved
    assert json.loads((tmp_path / "report.json").read_text())["frozen_entries_moved"]


def test_two_lines_tell_what_happened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a Lightning Trainer without a logger shows nothing of the run."""
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback()).fit(Classifier(), loader())
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("deepclean: ")]
    assert len(lines) == 2
    assert "selected by deepclean" in lines[0]
    assert f"0 frozen entries moved in 16 optimizer steps, report in {tmp_path}" in lines[1]


def test_every_option_reaches_the_run(tmp_path: Path) -> None:
    """Fails if an option that a session takes is not taken, or not used, by the callback."""
    run = callback(
        scores=True,
        test=RETAIN,
        forget_test=FORGET,
        gold=[Classifier(), Classifier()],
        norm_statistics="freeze",
        dead_count=False,
        batch_size=4,
        progress=False,
        folder=tmp_path / "told",
    )
    trainer(tmp_path, run).fit(Classifier(), loader())
    assert set(run.report.scores["after"]["sets"]) == {"forget", "retain", "test", "forget_test"}
    assert run.report.dead_fraction is None
    assert (tmp_path / "told" / "report.txt").is_file()
    assert not (tmp_path / "report.txt").exists()
    with pytest.raises(TypeError, match="no option 'golds'; the options are loss_fn"):
        callback(golds=1)


def test_a_run_that_was_killed_before_its_report_is_finished(tmp_path: Path) -> None:
    """Fails if resuming from the last checkpoint, where Lightning has nothing left to train, leaves
    the run without its count and its report."""
    model = Classifier()
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, "last")
    fit = trainer(tmp_path / "first", callback(), saving, enable_checkpointing=True)
    fit.fit(model, loader())
    again, run = Classifier(), callback()
    last = str(tmp_path / "last.ckpt")
    trainer(tmp_path / "again", run).fit(again, loader(), ckpt_path=last, weights_only=False)
    assert same_bits(bits_of(model), bits_of(again))
    assert run.report.phase == "finished"
    assert run.report.optimizer_steps == 16
    assert json.loads((tmp_path / "again" / "report.json").read_text())["phase"] == "finished"
