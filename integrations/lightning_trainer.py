"""DeepCleanLightningCallback: unlearning inside a Lightning Trainer, whose train loader is D_r.

All phases up to the guard happen in `on_train_start`: by then the processes have met, the
checkpoint, if any, is loaded, and the optimizers are there; autocast is only around the steps.
"""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from deepclean_hooks import ranks
from deepclean_hooks.data import losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data
from deepclean_hooks.guard.guard import NormStatistics
from deepclean_hooks.integrations.run_output import selection_figures, write_report
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods import DeepClean
from deepclean_hooks.methods.method import Method
from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.metrics.evaluation import Evaluation
from deepclean_hooks.report.report import Report
from deepclean_hooks.session import Session
from deepclean_hooks.stored import checkpoint, sealed
from deepclean_hooks.stored.sealed import BrokenRun

KEY = "deepclean_hooks"  # in every checkpoint, beside the weights


class DeepCleanLightningCallback(Callback):  # type: ignore[misc]  # Any to the type checker
    """Unlearns `forget` in the LightningModule whose `fit` it is given to; `report` tells how it
    went.

    `retain` is the train loader by default, which must not hold the forget samples; `forget` and
    `test` are loaders, or data sets read with the batch size and collate function of the train
    loader. `forward(x)` of the LightningModule must return logits, or `loss_fn` says what to
    measure. The other arguments are those of `Session`.

    Each checkpoint gets the masks and a digest of its weights. A resumed run neither measures nor
    resets, and refuses a checkpoint that did not come back bit for bit; a second `fit()` goes on
    with the masks of the first. report.json and report.txt are written to `default_root_dir`, and
    deepclean_* figures go to the Trainer's loggers.
    """

    def __init__(
        self,
        forget: Data,
        *,
        method: Method | None = None,
        retain: Data | Measurement | None = None,
        loss_fn: LossFn | None = None,
        norm_statistics: NormStatistics = "update",
        test: Data | None = None,
        gold: nn.Module | Evaluation | None = None,
        scores: bool = True,
    ) -> None:
        """`method` is DeepClean() by default; one that trains by an objective of its own is
        refused."""
        self.method = method or DeepClean()
        self.method.require_plain_training()
        self._forget, self._retain, self._test = forget, retain, test
        self._options: dict[str, Any] = {
            "loss_fn": loss_fn,
            "norm_statistics": norm_statistics,
            "gold": gold,
            "scores": scores,
        }
        self._run: Session | None = None
        # Kept for the next call of fit(): whose run it was, and the run.
        self._kept: tuple[weakref.ref[nn.Module], dict[str, Any]] | None = None
        self._loaded: dict[str, Any] | None = None  # from the checkpoint that fit() begins with

    @property
    def report(self) -> Report:
        """The account so far; complete after `fit()`."""
        if self._run is None:
            raise RuntimeError("there is no report before trainer.fit() has begun")
        return self._run.report

    def close(self) -> None:
        """Takes every hook off the model and the optimizers; safe at any time, and twice."""
        if self._run is not None:
            self._run.close()

    # ------------------------------------------------------------------ events of the Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work before any time is spent."""
        if stage == "fit":
            _refuse_strategies(trainer)
            if self._options["loss_fn"] is None and _no_forward(pl_module):
                raise TypeError(
                    f"{type(pl_module).__name__} has no forward(), which is what is measured; "
                    "define forward(x) to return the logits, or pass loss_fn="
                )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the run out of the checkpoint; it is verified when the training starts."""
        self._loaded = checkpoint.get(KEY, {})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the run to the checkpoint that is about to be written."""
        if self._kept is not None:
            progress = {} if self._run is None else self._run.so_far()
            checkpoint[KEY] = sealed.seal({**self._kept[1], **progress}, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, selects and resets, or takes up a stored run; then sets the guard."""
        self.close()
        ranks.refuse_lossy_reduction(trainer.strategy.model)
        run = self._session(trainer, pl_module)
        if self._loaded is not None:
            with ranks.fail_together():
                run.load_state_dict(_verified(pl_module, self._loaded))
            self._watch(trainer, run)
        elif self._kept is not None and self._kept[0]() is pl_module:
            run.load_state_dict(self._kept[1])
            self._watch(trainer, run)
        else:
            run.measure(self._read(trainer, self._forget), self._retained(trainer))
            run.select()
            run.reset()
        self._loaded = None
        self._run, self._kept = run, (weakref.ref(pl_module), run.state_dict())
        run.guard(*trainer.optimizers)
        write_report(self.report, Path(trainer.default_root_dir))
        _log(trainer, selection_figures(run.report))
        if not run.trains:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what the model still knows of the forget set."""
        if self._run is None or trainer.sanity_checking or not self._options["scores"]:
            return
        with contextlib.suppress(*losses.not_for_scores(self._options["loss_fn"])):
            found = evaluate(
                pl_module,
                forget=self._read(trainer, self._forget),
                membership=False,
                progress=_shows_progress(trainer),
            )
            scores = found.sets["forget"]
            figures = {
                "deepclean_forget_accuracy": scores.accuracy,
                "deepclean_forget_loss": scores.loss,
            }
            _log(trainer, figures)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts, scores and reports."""
        if self._run is None:
            return
        try:
            report = self._run.finish()
        finally:
            self.close()
        write_report(self.report, Path(trainer.default_root_dir))
        _log(trainer, {"deepclean_frozen_entries_moved": report.frozen_entries_moved})

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Takes the hooks off."""
        self.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks off, if an event was left out."""
        self.close()

    # ------------------------------------------------------------------ inside

    def _session(self, trainer: Trainer, model: LightningModule) -> Session:
        return Session(
            model,
            self.method,
            test=None if self._test is None else self._read(trainer, self._test),
            progress=_shows_progress(trainer),
            **self._options,
        )

    def _retained(self, trainer: Trainer) -> Data | Measurement:
        if self._retain is None:
            return _train_loader(trainer)
        if isinstance(self._retain, Measurement):
            return self._retain
        return self._read(trainer, self._retain)

    def _watch(self, trainer: Trainer, run: Session) -> None:
        run.watch(forget=self._read(trainer, self._forget))
        retain = self._retained(trainer)
        if not isinstance(retain, Measurement):
            run.watch(retain=retain)

    def _read(self, trainer: Trainer, data: Data) -> Data:
        if isinstance(data, DataLoader):
            return data
        like = _train_loader(trainer)
        return DataLoader(data, batch_size=like.batch_size or 1, collate_fn=like.collate_fn)


def _refuse_strategies(trainer: Trainer) -> None:
    name = type(trainer.strategy).__name__
    if name in ("FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"{name} flattens the weights, so no entry of them can be named or held; use "
            'strategy="ddp"'
        )


def _no_forward(model: LightningModule) -> bool:
    return type(model).forward is LightningModule.forward


def _train_loader(trainer: Trainer) -> DataLoader[Any]:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"the train loader is a {type(loader).__name__}, of which it is not known how to read "
            "each sample once; pass retain= and forget= as DataLoaders"
        )
    return loader


def _shows_progress(trainer: Trainer) -> bool:
    return trainer.progress_bar_callback is not None


def _verified(model: nn.Module, stored: dict[str, Any]) -> dict[str, Any]:
    """The run of a checkpoint, once the model has the checkpoint's weights, every bit."""
    try:
        run = sealed.opened(stored, "the checkpoint")
        if checkpoint.model_digest(model) != stored["model"]:
            raise BrokenRun("the weights that were loaded are not those that were saved")
    except BrokenRun as reason:
        raise BrokenRun(
            f"{reason}. Take another checkpoint of a run with DeepCleanLightningCallback, or begin "
            "anew from the original model, without ckpt_path"
        ) from reason
    return run


def _log(trainer: Trainer, figures: dict[str, Any]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)
