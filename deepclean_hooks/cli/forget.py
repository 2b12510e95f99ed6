"""`forget`: model, data and what to forget -> the unlearned checkpoint and its papers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.utils.data import Dataset

from deepclean_hooks.cli.datasets import DataOptions, Pictures, opened
from deepclean_hooks.cli.models import Loaded, ModelOptions, load, require_head
from deepclean_hooks.cli.preprocessing import PreprocessingOptions
from deepclean_hooks.cli.what import WhatOptions, chosen
from deepclean_hooks.integrations.recipe import unlearn
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.named import named
from deepclean_hooks.report.report import Report
from deepclean_hooks.session import Session
from deepclean_hooks.stored import checkpoint
from deepclean_hooks.stored.files import write_text

GONE = "do-not-use.txt"
_RUN, _REQUEST = "run.deepclean", "request.json"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The method, and how it trains."""

    method: Annotated[
        str, "as in Python: SSD(alpha=5), NegGradPlus(train=DeepClean(gamma=1.1))"
    ] = "DeepClean"
    epochs: Annotated[int, "over the data that stay"] = 3
    steps: Annotated[int | None, "of the optimizer, instead of epochs"] = None
    lr: Annotated[float, "Adam's learning rate, which falls to 0"] = 1e-3
    seed: Annotated[int, "of the order of the samples, and of dropout"] = 0


@dataclass(frozen=True, kw_only=True)
class Forget(TrainingOptions, WhatOptions, DataOptions, PreprocessingOptions, ModelOptions):
    """Forget some of the training data of a model."""

    output: Annotated[Path, "the folder of the results; the same command goes on after a kill"]
    dry_run: Annotated[bool, "measure, say what would be selected and what it costs, and end"] = (
        False
    )
    scores: Annotated[bool, "score the model before and after"] = True


@dataclass(frozen=True)
class Request:
    """What a command works on: the model and its sets, checked."""

    loaded: Loaded
    data: Pictures
    forget: Dataset[Any]
    retain: Dataset[Any]
    others: Mapping[str, Pictures]
    gone: list[str]

    def method(self, text: str) -> Method:
        """The method that a text names, with what the data say."""
        provided: dict[str, Any] = {
            name: data for name, data in self.others.items() if name == "held_out"
        }
        if self.data.classes is not None:
            provided["classes"] = len(self.data.classes)
        return named(text, provided)


def forget(given: Forget) -> int:
    """0 once the unlearned checkpoint is written; raises ValueError for what does not fit."""
    torch.manual_seed(given.seed)
    if given.weights is not None and given.output.resolve() == given.weights.parent.resolve():
        raise ValueError(
            f"--output {given.output} holds the original {given.weights.name}; name another folder"
        )
    request = asked(given)
    method = request.method(given.method)
    if given.dry_run:
        return _dry_run(given, request, method)
    if not _begin(given, request, method):
        say(f"finished before: {given.output}")
        return 0
    report = unlearn(
        request.loaded.model,
        request.forget,
        request.retain,
        method=method,
        epochs=given.epochs,
        steps=given.steps,
        lr=given.lr,
        seed=given.seed,
        checkpoint=given.output / _RUN,
        folder=given.output,
        test=request.others.get("test"),
        scores=given.scores,
        batch_size=given.batch_size,
    )
    if is_first():
        _write(given, request, report)
    return 0


def asked(given: Any) -> Request:
    """Reads the data and the model of a command's options, and tries the model on a sample."""
    data = opened(given.data, given)
    gone, rest = chosen(data, given)
    count = None if data.classes is None else len(data.classes)
    loaded = load(given, given, count)
    others = {
        name: opened(spec, given, data.classes)
        for name in ("test", "held_out")
        if (spec := getattr(given, name)) is not None
    }
    for each in (data, *others.values()):
        each.transform = loaded.transform
    highest = max(max(each.targets) for each in (data, *others.values()))
    require_head(loaded, data[gone.indices[0]][0], highest, count)
    say(f"preprocessing: {loaded.preprocessing}")
    say(f"data: {len(data)} samples of {data.where}, of which {len(gone)} to forget")
    return Request(loaded, data, gone, rest, others, [data.names[i] for i in gone.indices])


def is_first() -> bool:
    """Whether this process is the one that writes and speaks, before a group is initialised too."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Prints a line once over all processes."""
    if is_first():
        print(line, flush=True)


def _dry_run(given: Forget, request: Request, method: Method) -> int:
    run = Session(request.loaded.model, method, scores=False, batch_size=given.batch_size)
    run.measure(request.forget, request.retain)
    preview = run.select()
    spent, count = run.report.seconds.get("fisher", 0.0), len(request.data) - len(request.gone)
    steps = given.steps or given.epochs * -(-count // given.batch_size)
    say(str(preview))
    say(f"would forget: {', '.join(request.gone[:10])}{' ...' if len(request.gone) > 10 else ''}")
    share = steps * given.batch_size / len(request.data)
    say(
        f"would train {steps} steps of {given.batch_size}, about {share * spent:.0f} s (a step as "
        f"long as measuring so many samples, {spent:.0f} s for all); nothing was written"
    )
    return 0


def _begin(given: Forget, request: Request, method: Method) -> bool:
    """Whether there is something to do; raises ValueError if the folder holds another run."""
    now = {
        "model": checkpoint.model_digest(request.loaded.model),
        "method": f"{method.name} {method.settings()}",
        "training": f"{given.epochs} {given.steps} {given.lr} {given.seed} {given.batch_size}",
        "preprocessing": request.loaded.preprocessing,
        "data": _digest(request.data.names),
        "what to forget": _digest(request.gone),
    }
    path = given.output / _REQUEST
    if path.is_file():
        before = _read(path)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            raise ValueError(
                f"{given.output} holds the run of another request ({', '.join(changed)} differ); "
                "name another --output"
            )
        finished = (given.output / GONE).is_file()
        if finished and is_first():
            (given.output / _RUN).unlink(missing_ok=True)
        return not finished
    if is_first():
        given.output.mkdir(parents=True, exist_ok=True)
        if any(given.output.iterdir()):
            raise ValueError(f"{given.output} is not empty; name another --output")
        write_text(path, json.dumps(now, indent=2) + "\n")
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise ValueError(f"{path} is damaged: {reason}; name another --output") from reason
    return found if isinstance(found, dict) else {}


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _write(given: Forget, request: Request, report: Report) -> None:
    """The results, the mark of a finished run last."""
    where = request.loaded.save(given.output)
    write_text(given.output / "report.html", report.to_html())
    write_text(given.output / "model-card.md", report.to_model_card())
    write_text(given.output / GONE, "".join(f"{name}\n" for name in request.gone))
    (given.output / _RUN).unlink(missing_ok=True)
    say(str(report))
    say(f"unlearned model: {where}; page: {given.output / 'report.html'}")
