"""DeepCleanCallback: unlearning inside a Hugging Face Trainer, whose train_dataset is D_r.

All phases up to the guard happen in `on_train_begin`: only there it is known whether the run is a
resumed one, and the Trainer's collator, device and optimizer are there. What has been done to the
model by then (autocast inside `forward`, DistributedDataParallel) is taken off while measuring.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from deepclean_hooks import ranks
from deepclean_hooks.data import losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data
from deepclean_hooks.guard.follow import follow, weakly
from deepclean_hooks.guard.guard import NormStatistics
from deepclean_hooks.integrations.run_output import selection_figures, write_report
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods import DeepClean
from deepclean_hooks.methods.method import Method
from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.metrics.evaluation import Evaluation
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.report.report import Report
from deepclean_hooks.session import Session
from deepclean_hooks.stored import checkpoint, sealed
from deepclean_hooks.stored.sealed import BrokenRun

FILE = "deepclean.pt"  # in every checkpoint folder, beside the weights
_log = logging.getLogger(__name__)


class DeepCleanCallback(TrainerCallback):
    """Unlearns `forget` in the model of the Trainer it is given to; `report` tells how it went.

    `forget`, `retain` (by default the Trainer's train_dataset, which must not hold the forget
    samples) and `test` are data sets, read with the Trainer's collator, or loaders. The other
    arguments are those of `Session`; `loss_fn` is for measuring, and what the Trainer minimises
    (label smoothing, class weights, compute_loss) does not enter it.

    Each checkpoint gets the masks and a digest of its weights. A resumed run neither measures nor
    resets, and refuses a checkpoint that did not come back bit for bit. A second `train()` goes on
    with the masks of the first. report.json and report.txt are written to the output_dir, and
    deepclean_* figures go to the Trainer's log.
    """

    def __init__(
        self,
        forget: Data | None = None,
        *,
        method: Method | None = None,
        retain: Data | Measurement | None = None,
        loss_fn: LossFn | None = None,
        norm_statistics: NormStatistics = "update",
        test: Data | None = None,
        gold: nn.Module | Evaluation | None = None,
        scores: bool = True,
    ) -> None:
        """`forget` may be left out of a run that is resumed; `method` is DeepClean() by default."""
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
        self._trainer: weakref.ref[Trainer] | None = None
        # Kept for the next call of train(): whose run it was, and the run.
        self._kept: tuple[weakref.ref[nn.Module], dict[str, Any]] | None = None
        self._verified = False  # the weights of this call of train(), against a checkpoint

    @property
    def report(self) -> Report:
        """The account so far; complete after `train()`."""
        if self._run is None:
            raise RuntimeError("there is no report before trainer.train() has begun")
        return self._run.report

    def close(self) -> None:
        """Takes every hook off the model and the optimizer; safe at any time, and twice."""
        if self._run is not None:
            self._run.close()

    # ------------------------------------------------------------------ events of the Trainer

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses what cannot work before any time is spent."""
        trainer, _ = _calling_trainer()
        _refuse_sharding(trainer)
        self._meet(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measures, selects and resets, or takes up a stored run; then sets the guard."""
        trainer, folder = _calling_trainer()
        _refuse_sharding(trainer)
        self._meet(trainer)
        self.close()
        ranks.refuse_lossy_reduction(trainer.model_wrapped)
        model: nn.Module = kwargs["model"]
        run = self._session(trainer, model)
        if state.global_step > 0 and not self._verified:
            where = Path(folder) if folder else _checkpoint(args, state)
            with ranks.fail_together():
                run.load_state_dict(_verified(model, where))
            self._watch(trainer, run)
        elif self._kept is not None and self._kept[0]() is model:
            run.load_state_dict(self._kept[1])
            self._watch(trainer, run)
        else:
            _warn_of_old_checkpoints(args)
            run.measure(*self._sets(trainer, kwargs.get("train_dataloader")))
            run.select()
            run.reset()
        self._verified = True
        self._run, self._kept = run, (weakref.ref(model), run.state_dict())
        run.guard(kwargs["optimizer"])
        write_report(self.report, _folder(args))
        trainer.log(_figures(run.report))
        if not run.trains:
            control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the run to the checkpoint that was just written."""
        folder = _checkpoint(args, state)
        if self._run is not None and self._kept is not None and args.should_save:
            if folder.is_dir():
                now = {**self._kept[1], **self._run.so_far()}
                sealed.write(sealed.seal(now, kwargs["model"]), folder / FILE)
            else:
                _log.warning("no masks were saved: there is no folder %s", folder)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs what the model still knows of the forget set."""
        trainer, _ = _calling_trainer()
        if self._run is None or self._forget is None or not self._options["scores"]:
            return
        progress = not args.disable_tqdm
        with contextlib.suppress(*losses.not_for_scores(self._options["loss_fn"])):
            found = evaluate(
                kwargs["model"],
                forget=self._reading(trainer, self._forget),
                membership=False,
                progress=progress,
            )
            scores = found.sets["forget"]
            trainer.log(
                {
                    "deepclean_forget_accuracy": scores.accuracy,
                    "deepclean_forget_loss": scores.loss,
                }
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Verifies the weights that were loaded at the end, if any; counts, scores, reports."""
        if self._run is None:
            return
        best = state.best_model_checkpoint
        try:
            if args.load_best_model_at_end and best is not None:
                with ranks.fail_together():
                    _verified(kwargs["model"], Path(best))
            report = self._run.finish()
        finally:
            self.close()
        write_report(self.report, _folder(args))
        # Not trainer.log(): TensorBoard's and other writers have closed by now.
        figures = {
            "deepclean_frozen_entries_moved": report.frozen_entries_moved,
            "deepclean_optimizer_steps": report.optimizer_steps,
            "step": state.global_step,
        }
        state.log_history.append(figures)  # type: ignore[arg-type]  # not None after finish()

    # ------------------------------------------------------------------ inside

    def _meet(self, trainer: Trainer) -> None:
        if self._trainer is None or self._trainer() is not trainer:
            self._trainer = weakref.ref(trainer)
            # on_train_end does not happen after an exception.
            follow(trainer, "train", weakly(self._around_training))

    @contextlib.contextmanager
    def _around_training(self, trainer: Trainer, name: str, *_: Any, **__: Any) -> Iterator[None]:
        self._verified = False
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _session(self, trainer: Trainer, model: nn.Module) -> Session:
        return Session(
            model,
            self.method,
            test=None if self._test is None else self._reading(trainer, self._test),
            progress=not trainer.args.disable_tqdm,
            **self._options,
        )

    def _sets(
        self, trainer: Trainer, train_dataloader: Data | None
    ) -> tuple[Data, Data | Measurement]:
        if self._forget is None:
            raise ValueError(
                "DeepCleanCallback has no forget set; it can be left out only where "
                "trainer.train(resume_from_checkpoint=...) takes up a run"
            )
        retain = trainer.train_dataset if self._retain is None else self._retain
        if isinstance(retain, Measurement):
            return self._reading(trainer, self._forget), retain
        if retain is None:  # a Trainer that overrides get_train_dataloader()
            retain = train_dataloader
        assert retain is not None
        return self._reading(trainer, self._forget), self._reading(trainer, retain)

    def _watch(self, trainer: Trainer, run: Session) -> None:
        retain = trainer.train_dataset if self._retain is None else self._retain
        sets = {"forget": self._forget, "retain": retain}
        known = {
            name: self._reading(trainer, data)
            for name, data in sets.items()
            if data is not None and not isinstance(data, Measurement)
        }
        run.watch(**known)

    def _reading(self, trainer: Trainer, data: Any) -> Data:
        """A loader of the Trainer's: its collator, without the columns its model does not take."""
        if isinstance(data, torch.utils.data.DataLoader):
            return data
        # Not get_eval_dataloader(): with persistent workers it returns the one of another set.
        loader: Data = trainer.get_test_dataloader(data)
        return loader


def _calling_trainer() -> tuple[Trainer, str | None]:
    """The Trainer whose event this is, and the folder it resumes from, read from the call stack.

    Callbacks are told neither. They need the first to log (what `on_log` changes comes after
    TensorBoard's turn) and for its collator, the second because a checkpoint may have been moved.
    """
    trainer: Trainer | None = None
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        who = frame.f_locals.get("self")
        if isinstance(who, Trainer) and (trainer is None or who is trainer):
            trainer = who
            folder = frame.f_locals.get("resume_from_checkpoint")
            if isinstance(folder, str | Path):
                return trainer, str(folder)
    if trainer is None:
        raise RuntimeError(
            "DeepCleanCallback found no Trainer that calls it; give it to one by callbacks=[...]"
        )
    return trainer, None


def _refuse_sharding(trainer: Trainer) -> None:
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed steps flattened copies of the weights, which no mask of the weights can "
            "hold; train under DistributedDataParallel (torchrun without a DeepSpeed config)"
        )
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "under FSDP a Trainer shards the model before it tells a callback, and its FSDP1 "
            "leaves no entry that can be named; train under DistributedDataParallel (fsdp left out "
            "of the arguments), or use a Session or DeepCleanHook under FSDP2 (fully_shard) in a "
            "loop of your own"
        )


def _warn_of_old_checkpoints(args: TrainingArguments) -> None:
    found = sorted(path.parent for path in _folder(args).glob("checkpoint-*/trainer_state.json"))
    told = [str(folder) for folder in found if not (folder / FILE).is_file()]
    if told and ranks.is_first():
        _log.warning(
            "checkpoints from before the reset still hold what is to be forgotten, weights and "
            "optimizer.pt: %s",
            ", ".join(told),
        )


def _folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer has just saved."""
    return _folder(args) / f"checkpoint-{state.global_step}"


def _figures(report: Report) -> dict[str, float]:
    """The numbers of the selection, for the Trainer's log."""
    found = selection_figures(report)
    before = report.scores.get("before")
    if isinstance(before, dict):
        found["deepclean_forget_accuracy_before"] = float(before["sets"]["forget"]["accuracy"])
    return found


def _verified(model: nn.Module, folder: Path) -> dict[str, Any]:
    """The run in a checkpoint, once the model has the checkpoint's weights, every bit.

    transformers loads a ViT's checkpoint under other names than it saved it, skips what it does not
    find and says so in a warning only (its issue 43701): 69 % of W_f came back not forgotten.
    """
    try:
        stored = sealed.read(folder / FILE)
        run = sealed.opened(stored, str(folder / FILE))
        if checkpoint.model_digest(model) != stored["model"]:
            _load_every_weight(model, folder)
        if checkpoint.model_digest(model) != stored["model"]:
            raise BrokenRun(
                f"the weights that were loaded from {folder} are not those that were saved there"
            )
    except BrokenRun as reason:
        raise BrokenRun(
            f"{reason}. Take another checkpoint of a run with DeepCleanCallback, or begin anew "
            "from the original model, without resume_from_checkpoint and load_best_model_at_end"
        ) from reason
    return run


def _load_every_weight(model: nn.Module, folder: Path) -> None:
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        return
    _log.warning("the Trainer loaded %s in part; loading all of it", folder)
    devices = [d for d in {p.device for p in inner.parameters()} if d.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        fresh = type(inner).from_pretrained(folder, config=inner.config)
    inner.load_state_dict(fresh.state_dict())
