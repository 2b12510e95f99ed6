"""DeepCleanCallback: unlearning inside a Hugging Face Trainer, whose train_dataset is D_r.

All phases up to the guard happen in `on_train_begin`: by then ranks have met, the checkpoint, if
any, is loaded, and autocast is off (it is only around single steps). The run is finished when
`train` has returned, after what other callbacks do at the end; its entry is written into a
checkpoint right after the weights, before the Trainer deletes an older checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from deepclean_hooks import ranks
from deepclean_hooks.data.samples import Data
from deepclean_hooks.guard.follow import follow, weakly
from deepclean_hooks.integrations.beginning import verified
from deepclean_hooks.integrations.callback import UnlearningCallback
from deepclean_hooks.integrations.run_output import line_after, line_before, selection_figures
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.stored import sealed
from deepclean_hooks.stored.sealed import BrokenRun

FILE = "deepclean.pt"  # in every checkpoint folder, beside the weights
_STATE = "trainer_state.json"  # the last file of a checkpoint
_WAY_OUT = (
    "Take another checkpoint of a run with DeepCleanCallback, or begin anew from the original "
    "model, without resume_from_checkpoint and load_best_model_at_end"
)
_log = logging.getLogger(__name__)


class DeepCleanCallback(UnlearningCallback, TrainerCallback):
    """Unlearns `forget` in the model of the Trainer it is given to; `report` tells how it went.

    `forget`, `retain` (by default the Trainer's train_dataset, which must not hold the forget
    samples) and the test sets are data sets, read with the Trainer's collator, or loaders. The
    other arguments are those of `Session`; `loss_fn` is for measuring, and what the Trainer
    minimises (label smoothing, class weights, compute_loss) does not enter it.

    Each checkpoint gets the masks and a digest of its weights. A resumed run neither measures nor
    resets, and refuses a checkpoint that did not come back bit for bit. A second `train()` goes on
    with the masks of the first. report.json and report.txt are written to `folder`, by default the
    output_dir; deepclean_* figures go to the Trainer's log, two lines to the terminal.

    `Trainer(callbacks=[callback])` or `callback.attach(trainer)`. The Trainer does not tell its
    callbacks who it is: where it was not attached, it is found in the call stack.
    """

    _training = "trainer.train()"
    _trainer: weakref.ref[Trainer] | None = None
    _resumed_from: Path | None = None  # what this call of train() was told to resume from
    _saving: Path | None = None  # the checkpoint folder that is being written
    _saved: Path | None = None  # the last one that got its entry
    _verified = False  # the weights of this call of train(), against a checkpoint
    _followed = False  # whether this call of train() is one that is followed
    _ended = False  # whether it came to its end

    def attach(self, trainer: Trainer) -> DeepCleanCallback:
        """Joins a Trainer, which calls it from then on; the call stack is not looked at."""
        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        self._meet(trainer)
        return self

    # ------------------------------------------------------------------ events of the Trainer

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses what cannot work before any time is spent."""
        self._meet(self._of(state))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measures, selects and resets, or takes up a stored run; then sets the guard."""
        trainer = self._of(state)
        self._meet(trainer)
        ranks.refuse_lossy_reduction(trainer.model_wrapped)
        model: nn.Module = kwargs["model"]
        stored = None
        if state.global_step > 0 and not self._verified:
            folder = self._resumed_from or _calling_trainer()[1] or self._checkpoint(trainer)

            def stored() -> dict[str, Any]:
                return _verified(model, folder)

        elif self._kept is None or self._kept[0]() is not model:
            _warn_of_old_checkpoints(self._run_dir(trainer))
        retain = trainer.train_dataset if self._retain is None else self._retain
        if retain is None:  # a Trainer that overrides get_train_dataloader()
            retain = kwargs.get("train_dataloader")
        run = self._begin(
            model,
            retain,
            lambda data: self._reading(trainer, data),
            [kwargs["optimizer"]],
            folder=self._reports(args),
            progress=not args.disable_tqdm,
            stored=stored,
        )
        self._verified = True
        trainer.log(selection_figures(run.report))
        _say(line_before(run.report, self._reports(args)))
        if not run.trains:
            control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the run to the checkpoint that was just written, if it is not there yet."""
        folder = self._checkpoint(self._of(state))
        if folder != self._saved:
            self._add_to(folder, kwargs["model"], args)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs what the model still knows of the forget set."""
        trainer = self._of(state)
        figures = self._known_of_forget(
            kwargs["model"],
            lambda data: self._reading(trainer, data),
            self._shows(not args.disable_tqdm),
        )
        if figures:
            trainer.log(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Verifies the weights that were loaded at the end, if any."""
        best = state.best_model_checkpoint
        if self._run is not None and args.load_best_model_at_end and best is not None:
            _verified(kwargs["model"], Path(best))
        self._ended = True
        if not self._followed:  # added by another callback after train() had begun
            self._end(self._of(state))

    # ------------------------------------------------------------------ inside

    def _of(self, state: TrainerState) -> Trainer:
        """The Trainer whose event this is."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None and trainer.state is state:
            return trainer
        return _calling_trainer()[0]

    def _meet(self, trainer: Trainer) -> None:
        _refuse_sharding(trainer)
        if self._trainer is not None and self._trainer() is trainer:
            return
        self._trainer = weakref.ref(trainer)
        follow(trainer, "train", weakly(self._around_training))
        if hasattr(trainer, "_save_checkpoint"):
            follow(trainer, "_save_checkpoint", weakly(self._around_checkpoint))
            follow(trainer, "save_model", weakly(self._around_weights))

    @contextlib.contextmanager
    def _around_training(
        self,
        trainer: Trainer,
        name: str,
        resume_from_checkpoint: str | bool | None = None,
        *_: Any,
        **__: Any,
    ) -> Iterator[None]:
        self._verified = self._ended = False
        self._resumed_from = _resumed_from(resume_from_checkpoint, trainer.args)
        if self._resumed_from is not None:
            _require_complete(self._resumed_from)
        self._followed = True
        try:
            yield
            if self._ended:
                self._end(trainer)
        finally:  # on_train_end does not happen after an exception
            self._followed = False
            self.close()

    @contextlib.contextmanager
    def _around_checkpoint(
        self, trainer: Trainer, name: str, model: nn.Module, trial: Any = None, *_: Any, **__: Any
    ) -> Iterator[None]:
        self._saving = self._checkpoint(trainer, trial)
        try:
            yield
        finally:
            self._saving = None

    @contextlib.contextmanager
    def _around_weights(self, trainer: Trainer, name: str, *_: Any, **__: Any) -> Iterator[None]:
        yield
        if self._saving is not None:
            self._add_to(self._saving, cast(nn.Module, trainer.model), trainer.args)

    def _add_to(self, folder: Path, model: nn.Module, args: TrainingArguments) -> None:
        if self._run is None or not args.should_save:
            return
        entry = self._sealed(model)
        if entry is None:
            return
        if folder.is_dir():
            sealed.write(entry, folder / FILE)
            self._saved = folder
        else:
            _log.warning("no masks were saved: there is no folder %s", folder)

    def _end(self, trainer: Trainer) -> None:
        report = self._finish(self._reports(trainer.args))
        if report is None:
            return
        # Not trainer.log(): TensorBoard's and other writers have closed by now.
        figures = {
            "deepclean_frozen_entries_moved": report.frozen_entries_moved,
            "deepclean_optimizer_steps": report.optimizer_steps,
            "step": trainer.state.global_step,
        }
        trainer.state.log_history.append(figures)  # type: ignore[arg-type]  # none is None
        _say(line_after(report, self._reports(trainer.args)))

    def _reading(self, trainer: Trainer, data: Any) -> Data:
        """A loader of the Trainer's: its collator, without the columns its model does not take."""
        if isinstance(data, DataLoader):
            return data
        # Not get_eval_dataloader(): with persistent workers it returns the one of another set.
        loader = trainer.get_test_dataloader(data)
        if self._options.get("batch_size") or self._options.get("collate_fn"):
            return self._loader(loader.dataset, loader)
        read: Data = loader
        return read

    def _reports(self, args: TrainingArguments) -> Path:
        return self._folder or Path(args.output_dir or ".")

    @staticmethod
    def _run_dir(trainer: Trainer, trial: Any = None) -> Path:
        """Where the Trainer's checkpoints are: output_dir, or a folder in it for each trial."""
        folder: str = trainer._get_output_dir(trial)
        return Path(folder or ".")

    def _checkpoint(self, trainer: Trainer, trial: Any = None) -> Path:
        trial = trial or getattr(trainer, "_trial", None)
        return self._run_dir(trainer, trial) / f"checkpoint-{trainer.state.global_step}"


def _say(line: str) -> None:
    if ranks.is_first():
        tqdm.write(line)


def _calling_trainer() -> tuple[Trainer, Path | None]:
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
                return trainer, Path(folder)
    if trainer is None:
        raise RuntimeError(
            "DeepCleanCallback found no Trainer that calls it; give it to one by callbacks=[...], "
            "or call callback.attach(trainer)"
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


def _warn_of_old_checkpoints(folder: Path) -> None:
    old = [
        str(path.parent)
        for path in sorted(folder.glob(f"checkpoint-*/{_STATE}"))
        if not path.with_name(FILE).is_file()
    ]
    if old and ranks.is_first():
        _log.warning(
            "checkpoints from before the reset still hold what is to be forgotten, weights and "
            "optimizer.pt: %s",
            ", ".join(old),
        )


def _resumed_from(asked: str | bool | None, args: TrainingArguments) -> Path | None:
    """The folder that `train(resume_from_checkpoint=asked)` takes."""
    last: Any = asked
    if asked is True and args.output_dir and Path(args.output_dir).is_dir():
        last = get_last_checkpoint(args.output_dir)  # type: ignore[no-untyped-call]  # theirs
    return Path(last) if isinstance(last, str | Path) else None


def _require_complete(folder: Path) -> None:
    """Raises BrokenRun for a checkpoint that a kill has cut while it was written.

    Without its trainer_state.json the Trainer loads the weights and starts at step 0: the weights
    that have forgotten would be measured, and reset, as if they were the original's.
    """
    with ranks.fail_together():
        ours = (folder / FILE).is_file() or re.fullmatch(r"checkpoint-\d+", folder.name)
        if not ours or _is_complete(folder):
            return
        written = [path.parent for path in folder.parent.glob(f"checkpoint-*/{FILE}")]
        complete = [path for path in written if _is_complete(path)]
        last = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        way_out = _WAY_OUT if last is None else f"pass resume_from_checkpoint={str(last)!r}"
        raise BrokenRun(
            f"{folder} has no whole {_STATE}: it was cut while it was being written. {way_out}"
        )


def _is_complete(folder: Path) -> bool:
    """Whether the file that the Trainer writes last is there, and whole."""
    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _verified(model: nn.Module, folder: Path) -> dict[str, Any]:
    """The run in a checkpoint, once the model has the checkpoint's weights, every bit.

    transformers loads a ViT's checkpoint under other names than it saved it, skips what it does not
    find and says so in a warning only (its issue 43701): 69 % of W_f came back not forgotten.
    """
    with ranks.fail_together():
        try:
            stored = sealed.read(folder / FILE)
        except BrokenRun as reason:
            raise BrokenRun(f"{reason}. {_WAY_OUT}") from reason
    load = functools.partial(_load_every_weight, model, folder)
    return verified(model, stored, str(folder / FILE), _WAY_OUT, load)


def _load_every_weight(model: nn.Module, folder: Path) -> None:
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        return
    _log.warning("the Trainer loaded %s in part; loading all of it", folder)
    devices = [d for d in {p.device for p in inner.parameters()} if d.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        fresh = type(inner).from_pretrained(folder, config=inner.config)
    inner.load_state_dict(fresh.state_dict())
