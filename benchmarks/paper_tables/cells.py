"""One cell of the tables: one method on one scenario and seed, as a row of figures in a file."""

from __future__ import annotations

import math
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import deepclean_hooks as deepclean
from benchmarks.lab import results
from benchmarks.lab.timer import comparing
from examples.scenarios import Data, loader

from .cases import MEASURED, Case
from .methods import Contender, contender

Row = dict[str, Any]
BOUNDS = ("original", "gold")  # rows that no method makes


def cell(case: Case, name: str) -> Row:
    """The row: read if it was made before, else made and stored, whole or not at all."""
    return results.kept(cell_file(case, name), lambda: _row(case, name))


def cell_file(case: Case, name: str) -> Path:
    """Where a cell's row is kept."""
    return case.setup.folder / "cells" / f"{case.scenario}_{name}_{case.seed}.json"


def _row(case: Case, name: str) -> Row:
    gold = case.gold
    if name == "gold":
        if gold is None:
            raise ValueError("there is no gold beside a checkpoint: its recipe is not known")
        made: Row = {"model": gold.model, "seconds": gold.seconds}
    elif name == "original":
        made = {"model": case.original.model, "seconds": 0.0}
        made["training_seconds"] = case.original.seconds
    else:
        made = _unlearned(case, contender(name))
    model = made.pop("model")
    row = {"scenario": case.scenario, "method": name, "seed": case.seed}
    row |= _figures(case, model)
    ratio = None if gold is None else made["seconds"] / gold.seconds
    return {**row, "time_ratio": ratio, **made}


def _figures(case: Case, model: nn.Module) -> Row:
    """Accuracies and membership rates in per cent, and minus those of the gold of the same seed."""
    scores = case.judged(model, case.gold_scores)
    names = {
        "acc_dr": "retain.accuracy",
        "acc_df": "forget.accuracy",
        "acc_test": "test.accuracy",
        "acc_df_test": "forget_test.accuracy",
        "mia": "attack.entropy_regression.rate",
        "mia_confidence": "attack.confidence_svc.efficacy",
    }
    found = scores.figures()
    row: Row = {short: found.get(name) for short, name in names.items()}
    row |= {f"delta_{short}": scores.gaps.get(name) for short, name in names.items()}
    row["average_gap"] = scores.average_gap.value
    row["mia_attacker_accuracy"] = scores.figures().get(
        "attack.entropy_regression.attacker_accuracy"
    )
    row["retain_loss"], row["forget_loss"] = found["retain.loss"], found["forget.loss"]
    return row


def _unlearned(case: Case, row: Contender) -> Row:
    """The model that a method makes of the original, what it cost and how it was made."""
    torch.manual_seed(case.seed)
    model = case.copy()
    epochs = case.setup.fine_tune_epochs if row.epochs is None else row.epochs
    paid = case.stored_fisher[1] if row.stored else 0.0
    with warnings.catch_warnings(), comparing(case.setup.device).spent() as seconds:
        warnings.simplefilter("ignore", UserWarning)  # they stand in the report
        method = row.method(case)
        if row.later is not None:
            report, last = _in_rounds(case, row, model, epochs)
        elif method.own_training or row.by_unlearn:
            report = last = _by_unlearn(case, row, model, method, epochs)
        else:
            report = last = _by_session(case, row, model, method, (0, epochs, epochs))
    made: Row = {
        "model": model,
        "seconds": seconds[0] + paid,
        "selected_fraction": report.selected_fraction,
        "dead_fraction": report.dead_fraction,
        "frozen_entries_moved": last.frozen_entries_moved,
        "settings": {"method": method.name, **method.settings()},
        "warnings": list(report.warnings),
    }
    if last.optimizer_steps:
        length = {"epochs": epochs} if row.steps is None else {"steps": row.steps}
        trained = {**length, "batch_size": case.setup.fine_tune_batch}
        made["settings"]["training"] = {**trained, **vars(row.optimizer)}
    if row.few is not None:
        made["settings"]["samples"] = {"retain": report.retain_samples}
        made["settings"]["samples"]["forget"] = report.forget_samples
    if row.later is not None:
        made["settings"]["rounds"] = {"count": epochs, "later": row.later(case).name}
    return made


def _by_unlearn(
    case: Case, row: Contender, model: nn.Module, method: deepclean.Method, epochs: int
) -> deepclean.Report:
    """For methods with an objective of their own."""
    return deepclean.unlearn(
        model,
        case.sets.forget,
        case.sets.retain,
        method=method,
        epochs=epochs,
        batch_size=case.setup.fine_tune_batch,
        seed=case.seed,
        optimizer=row.optimizer,
        scores=False,
        progress=False,
    )


def _by_session(
    case: Case,
    row: Contender,
    model: nn.Module,
    method: deepclean.Method,
    span: tuple[int, int, int],
    first: bool = True,
) -> deepclean.Report:
    """Measures, changes and fine-tunes over a span (from epoch, to epoch, of epochs)."""
    run = deepclean.Session(model, method, scores=False, batch_size=MEASURED, progress=False)
    forget, retain = case.sets.forget, case.sets.retain
    if row.few is not None:
        kept, gone = row.few(case)
        forget, retain = case.few(forget, gone), case.few(retain, kept)
    if row.stored and first:
        run.measure(forget, case.stored_fisher[0])
        run.watch(retain=retain)
    else:
        run.measure(forget, retain)
    run.select()
    run.reset()
    run.guard()
    try:
        if run.trains:
            fine_tune(case, row, model, case.sets.retain, span)
        return run.finish()
    finally:
        run.close()


def _in_rounds(
    case: Case, row: Contender, model: nn.Module, epochs: int
) -> tuple[deepclean.Report, deepclean.Report]:
    """One epoch a round, everything measured anew before each; the first report and the last."""
    assert row.later is not None
    reports = []
    for epoch in range(epochs):
        method = (row.later if epoch else row.method)(case)
        span = (epoch, epoch + 1, epochs)
        reports.append(_by_session(case, row, model, method, span, first=not epoch))
    return reports[0], reports[-1]


def fine_tune(
    case: Case, row: Contender, model: nn.Module, data: Data, span: tuple[int, int, int]
) -> None:
    """The paper's recipe: cross-entropy, cosine annealing to 0, no augmentation; a part of its
    epochs goes on where the part before ended."""
    start, end, epochs = span
    batches = loader(data, case.setup.fine_tune_batch, case.seed + start)
    optimizer = row.optimizer([p for p in model.parameters() if p.requires_grad])
    before = start * len(batches)
    steps = row.steps or epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * (before + step) / steps)) / 2
    )
    model.train()
    for _ in range(end - start):
        for images, labels in islice(batches, row.steps):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
