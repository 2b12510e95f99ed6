"""`unlearn(model, forget, retain, ...)`: the paper's fine-tuning recipe, for those without a loop
of their own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from typing_extensions import Unpack

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.samples import Data, samples_of
from deepclean_hooks.integrations.loop import LoopRun, Unlearning
from deepclean_hooks.integrations.stopping import Watch, WhenForgotten, required
from deepclean_hooks.integrations.stored_training import StoredTraining
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.options import Options, require_known
from deepclean_hooks.report.report import Report
from deepclean_hooks.session import Session

if TYPE_CHECKING:
    from accelerate import Accelerator

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def unlearn(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    method: Method,
    epochs: int = 3,
    steps: int | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    optimizer: MakeOptimizer | None = None,
    stop: WhenForgotten | None = None,
    measured: Measurement | None = None,
    resume: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    folder: str | Path | None = None,
    **options: Unpack[Options],
) -> Report:
    """Unlearns in place and returns the report: Adam, cosine annealing to 0, cross-entropy, no
    augmentation of ours.

    `retain` is walked in shuffled order (by `seed`) in batches of `batch_size`, by default the
    loader's own or 64. Three epochs at 1e-3 are the paper's values for CIFAR; with `steps` it ends
    after so many steps of the optimizer instead, as a request of a few samples needs. `optimizer`
    makes another one of the parameters, such as `partial(torch.optim.SGD, lr=0.01, momentum=0.9)`.
    A method that trains otherwise than by a term beside the loss on D_r does so here, in one
    process. `stop=WhenForgotten(held_out)` ends the run when the forget set is met as unseen data
    and the retain set is back; if that never happens, the report's warnings say so. `resume` and
    `folder` are those of `unlearning`, the options those of `Session`.

    `measured`: a stored measurement of `retain`, or of the whole training set, so that `forget`
    alone is measured.

    `checkpoint`: a file in which the run is stored while it trains, after each epoch and about once
    a minute. Where it is there already, the same call on the original model goes on with that run,
    to the same bits; remove it once the weights are stored. A method that orders its batches by
    itself begins anew.

    Under `torchrun` or `accelerate launch` the processes share each batch, so that the recipe is
    the same on any number of them, and end with the same model; an incomplete last batch is filled
    up with samples of the epoch. This needs accelerate, and a batch size that they divide.

    Raises TypeError for a stored measurement as `retain`: it cannot be trained on.
    """
    if isinstance(retain, Measurement):
        raise TypeError(
            f"unlearn() trains on the retain set, and a stored {retain.noun} has no samples; pass "
            "the set itself, and the stored one as measured="
        )
    for name, count in (("epochs", epochs), ("steps", 1 if steps is None else steps)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive whole number, got {count!r}")
    stop = required(stop)
    if (steps is not None or stop is not None) and method.own_training:
        raise ValueError(
            f"{method.name} orders the batches of an epoch by itself; pass epochs=, and neither "
            "steps= nor stop="
        )
    if stop is not None and resume is not None:
        raise ValueError(
            "stop= compares the retain accuracy with the original's, which a resumed run does not "
            "have any more; leave stop= out"
        )
    if checkpoint is not None and (resume is not None or stop is not None):
        raise ValueError("checkpoint= stores and resumes by itself; leave resume= and stop= out")
    require_known(options, "unlearn")
    reading: dict[str, Any] = {key: options.get(key) for key in ("batch_size", "collate_fn")}
    kept = samples_of(retain, name="retain", **reading)
    loader = kept.shuffled(seed)
    per_epoch = len(loader)
    lasting = epochs if steps is None else -(-steps // per_epoch)
    method = method.scheduled(epochs=lasting, steps_per_epoch=per_epoch)
    progress = options.get("progress", True)
    with _launched(model, loader) as (wrapped, accelerator):
        path = None if checkpoint is None or method.own_training else Path(checkpoint)
        stored = StoredTraining(path, wrapped, loader)
        if path is not None:
            resume = stored.session
        run = LoopRun(wrapped, method, folder=folder, **options)
        make = optimizer or _adam(lr)
        watch = None if stop is None else Watch(stop, wrapped, kept)
        if measured is not None:
            run.watch(retain=retain)
        with Unlearning(run, forget, measured or retain, resume, ()):
            gone = samples_of(forget, name="forget", **reading)
            if run.trains and not method.own_training:
                total = steps or epochs * per_epoch

                def ends(done: int) -> bool:
                    return watch is not None and watch.ends(wrapped, gone, done)

                ended = _fine_tune(run, loader, total, make, progress, accelerator, ends, stored)
                if watch is not None and not ended:
                    run.warn(f"the run did not end by stop=: {watch.last}")
            elif run.trains:
                _train_by_method(run, gone.shuffled(seed + 1), loader, epochs, make, progress)
    return run.report


@contextmanager
def _launched(
    model: nn.Module, loader: DataLoader[Any]
) -> Iterator[tuple[nn.Module, Accelerator | None]]:
    """The model as it is in one process; in several, wrapped by an Accelerator, for a while."""
    world = max(ranks.world()[1], int(os.environ.get("WORLD_SIZE", "1")))
    if world == 1:
        yield model, None
        return
    if (loader.batch_size or 1) % world:
        raise ValueError(
            f"the {world} processes cannot share batches of {loader.batch_size} evenly; pass "
            f"batch_size={-(-(loader.batch_size or 1) // world) * world}"
        )
    accelerator = _accelerator()
    try:
        yield accelerator.prepare(model), accelerator
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator.free_memory()


def _accelerator() -> Accelerator:
    # Not at the top of the file: one process does without accelerate.
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import GradientState

    return Accelerator(
        cpu=not torch.cuda.is_available() or ranks.works_on_cpu(),
        # What a script's own Accelerator was given: all of them share this one number.
        gradient_accumulation_steps=GradientState().num_steps,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


def _fine_tune(
    run: Session,
    retain: DataLoader[Any],
    steps: int,
    make: MakeOptimizer,
    progress: bool,
    accelerator: Accelerator | None,
    ends: Callable[[int], bool],
    stored: StoredTraining,
) -> bool:
    """Trains for so many steps, or until `ends(steps done)`; returns whether that ended it."""
    model, loss_fn = run.model, run.loss_fn
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = make(trained)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    device = no_trace.device_of(unwrap(model))
    backward: Any = torch.Tensor.backward
    if accelerator is not None:
        optimizer, retain = accelerator.prepare(optimizer, retain)
        backward = accelerator.backward
    first, ended = stored.begin(run, optimizer, schedule), False
    hidden = None if progress and ranks.is_first() else True
    bar = tqdm(total=steps, initial=first, desc="fine-tune", disable=hidden)
    with no_trace.training(model), bar:
        for done, batch in enumerate(stored.batches(retain, first, steps), first + 1):
            batch = batches.to(batch, device)
            loss = losses.per_sample(loss_fn(model, batch), batches.size(batch)).mean()
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
            stored.stepped(done)
            ended = ends(done)
            if ended:
                break
    ranks.share_buffers(unwrap(model))
    stored.end(steps)
    return ended


def _adam(lr: float) -> MakeOptimizer:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def _train_by_method(
    run: Session,
    forget: DataLoader[Any],
    retain: DataLoader[Any],
    epochs: int,
    make: MakeOptimizer,
    progress: bool,
) -> None:
    if ranks.world()[1] > 1:
        raise RuntimeError(
            f"{run.method.name} trains in one process, {ranks.world()[1]} were launched; launch one"
        )
    model = unwrap(run.model)
    training = run.method.training(model, run.selection, run.loss_fn)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    total = epochs * training.length(forget, retain)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    device = no_trace.device_of(model)
    with no_trace.training(model), tqdm(disable=None if progress else True, total=total) as bar:
        for epoch in range(epochs):
            for step in training.steps(forget, retain, epoch):
                step = dataclasses.replace(step, batch=batches.to(step.batch, device))
                loss: Any = training.objective(model, step)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
