"""DeepCleanLightningCallback: unlearning inside a Lightning Trainer, whose train loader is D_r.

All phases up to the guard happen in `on_train_start`: by then the processes have met, the
checkpoint, if any, is loaded, and the optimizers are there; autocast is only around the steps. The
run is finished after the last event of the training, the strategy's: averages of the weights are
written into the model before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from deepclean_hooks import ranks
from deepclean_hooks.data.samples import Data
from deepclean_hooks.guard.follow import follow, weakly
from deepclean_hooks.integrations.beginning import verified
from deepclean_hooks.integrations.callback import UnlearningCallback
from deepclean_hooks.integrations.run_output import line_after, line_before, selection_figures

# They write an average into the model at the end. By name: the first is new in Lightning 2.6.
_AVERAGES = tuple(
    getattr(callbacks, name)
    for name in ("WeightAveraging", "StochasticWeightAveraging")
    if hasattr(callbacks, name)
)
KEY = "deepclean_hooks"  # in every checkpoint, beside the weights
_WAY_OUT = (
    "Take another checkpoint of a run with DeepCleanLightningCallback, or begin anew from the "
    "original model, without ckpt_path"
)


class DeepCleanLightningCallback(UnlearningCallback, Callback):  # type: ignore[misc]  # Any to mypy
    """Unlearns `forget` in the LightningModule whose `fit` it is given to; `report` tells how it
    went.

    `retain` is the train loader by default, which must not hold the forget samples; `forget` and
    the test sets are loaders, or data sets read with the batch size and collate function of the
    train loader. `forward(x)` of the LightningModule must return logits, or `loss_fn` says what to
    measure. The other arguments are those of `Session`.

    Each checkpoint gets the masks and a digest of its weights. A resumed run neither measures nor
    resets, and refuses a checkpoint that did not come back bit for bit; a second `fit()` goes on
    with the masks of the first. report.json and report.txt are written to `folder`, by default
    `default_root_dir`; deepclean_* figures go to the Trainer's loggers, two lines to its log.
    """

    _training = "trainer.fit()"
    _loaded: dict[str, Any] | None = None  # from the checkpoint that fit() begins with
    _unfollow: Callable[[], None] | None = None

    def close(self) -> None:
        """Takes every hook off the model and the optimizers; safe at any time, and twice."""
        super().close()
        if self._unfollow is not None:
            self._unfollow()
            self._unfollow = None

    # ------------------------------------------------------------------ events of the Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work before any time is spent."""
        if stage == "fit":
            _refuse_strategies(trainer)
            if self._options.get("loss_fn") is None and _no_forward(pl_module):
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
        entry = self._sealed(pl_module)
        if entry is not None:
            checkpoint[KEY] = entry

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, selects and resets, or takes up a stored run; then sets the guard."""
        ranks.refuse_lossy_reduction(trainer.strategy.model)
        stored = None
        if self._loaded is not None:
            loaded = self._loaded

            def stored() -> dict[str, Any]:
                return verified(pl_module, loaded, "the checkpoint", _WAY_OUT)

        run = self._begin(
            pl_module,
            _train_loader(trainer) if self._retain is None else self._retain,
            lambda data: self._read(trainer, data),
            trainer.optimizers,
            folder=self._reports(trainer),
            progress=_shows_progress(trainer),
            stored=stored,
        )
        self._loaded = None
        self._unfollow = follow(trainer.strategy, "on_train_end", weakly(self._around_the_end))
        _log(trainer, selection_figures(run.report))
        rank_zero_info(line_before(run.report, self._reports(trainer)))
        if not run.trains:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what the model still knows of the forget set."""
        if not trainer.sanity_checking:
            figures = self._known_of_forget(
                pl_module,
                lambda data: self._read(trainer, data),
                self._shows(_shows_progress(trainer)),
            )
            _log(trainer, figures)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finishes a run whose checkpoint was its last: Lightning then leaves the training out."""
        if self._loaded is not None:
            self.on_train_start(trainer, pl_module)
            self._end(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Takes the hooks off."""
        self.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks off, if an event was left out."""
        self.close()

    # ------------------------------------------------------------------ inside

    @contextlib.contextmanager
    def _around_the_end(self, strategy: Any, name: str) -> Iterator[None]:
        yield
        self._end(strategy.lightning_module.trainer)

    def _end(self, trainer: Trainer) -> None:
        averaged = any(isinstance(callback, _AVERAGES) for callback in trainer.callbacks)
        report = self._finish(self._reports(trainer), averaged=averaged)
        if report is not None:
            _log(trainer, {"deepclean_frozen_entries_moved": report.frozen_entries_moved})
            rank_zero_info(line_after(report, self._reports(trainer)))

    def _reports(self, trainer: Trainer) -> Path:
        return self._folder or Path(trainer.default_root_dir)

    def _read(self, trainer: Trainer, data: Data) -> Data:
        if isinstance(data, DataLoader):
            return data
        return self._loader(data, _train_loader(trainer))


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


def _log(trainer: Trainer, figures: dict[str, Any]) -> None:
    for logger in trainer.loggers if figures else ():
        logger.log_metrics(figures, step=trainer.global_step)
