"""`forget`: model, data and what to forget -> the unlearned checkpoint and its papers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from deepclean_hooks.cli.request import (
    METHOD,
    Request,
    RequestOptions,
    TrainingOptions,
    asked,
    is_first,
    say,
)
from deepclean_hooks.integrations.recipe import unlearn
from deepclean_hooks.measure.fisher import FisherDiagonal
from deepclean_hooks.methods.method import Method
from deepclean_hooks.report.report import Report
from deepclean_hooks.session import Session
from deepclean_hooks.stored import checkpoint
from deepclean_hooks.stored.files import write_text

GONE = "do-not-use.txt"
_RUN, _REQUEST = "run.deepclean", "request.json"


@dataclass(frozen=True, kw_only=True)
class Forget(TrainingOptions, RequestOptions):
    """Forget some of the training data of a model."""

    output: Annotated[Path, "the folder of the results; the same command goes on after a kill"]
    method: Annotated[str, METHOD] = "DeepClean"
    measured: Annotated[
        Path | None, "what `measure` stored of this model and the same data: saves that pass"
    ] = None
    dry_run: Annotated[bool, "measure, say what would be selected and its cost, and end"] = False
    scores: Annotated[bool, "score the model before and after"] = True


def forget(given: Forget) -> int:
    """0 once the unlearned checkpoint is written, 1 if nothing was selected for it; raises
    ValueError for what does not fit."""
    torch.manual_seed(given.seed)
    if given.weights is not None and given.output.resolve() == given.weights.parent.resolve():
        raise ValueError(
            f"--output {given.output} holds the original {given.weights.name}; name another folder"
        )
    if given.output.resolve().is_relative_to(Path(given.data).resolve()):
        raise ValueError(f"--output {given.output} lies within the data; name another folder")
    training = given.training()
    request = asked(given)
    method = request.method(given.method)
    stored = None if given.measured is None else FisherDiagonal.load(given.measured)
    if given.dry_run:
        return _dry_run(given, request, method, stored)
    if not _begin(given, request, method):
        say(f"finished before: {given.output}")
        return _judged(_read(given.output / "report.json")["selected_entries"], method)
    report = unlearn(
        request.loaded.model,
        request.sets["forget"],
        request.sets["retain"],
        method=method,
        **training,
        measured=stored,
        checkpoint=given.output / _RUN,
        folder=given.output,
        test=request.sets.get("test"),
        gold=request.golds or None,
        scores=given.scores,
        batch_size=given.batch_size,
    )
    if is_first():
        _write(given, request, report)
    return _judged(report.selected_entries, method)


def _dry_run(given: Forget, request: Request, method: Method, stored: FisherDiagonal | None) -> int:
    run = Session(request.loaded.model, method, scores=False, batch_size=given.batch_size)
    run.measure(request.sets["forget"], stored or request.sets["retain"])
    say(str(run.select()))
    measured = len(request.gone) if stored else len(request.data)
    spent, count = run.report.seconds.get("fisher", 0.0), len(request.data) - len(request.gone)
    steps = given.steps or given.epochs * -(-count // given.batch_size)
    seconds = steps * given.batch_size / measured * spent
    say(f"would forget: {', '.join(request.gone[:10])}{' ...' if len(request.gone) > 10 else ''}")
    say(
        f"would train {steps} steps of {given.batch_size} samples, about {seconds:.0f} s, as "
        f"measuring {measured} samples took {spent:.0f} s; nothing was written"
    )
    return 0


def _begin(given: Forget, request: Request, method: Method) -> bool:
    """Whether there is something to do; raises ValueError if the folder holds another run."""
    now = {
        "model": checkpoint.model_digest(request.loaded.model),
        "method": f"{method.name} {method.settings()}",
        "training": f"{given.training()} of {given.batch_size}",
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
        if any(not each.name.startswith(f".{_REQUEST}") for each in given.output.iterdir()):
            raise ValueError(f"{given.output} is not empty; name another --output")
        write_text(path, json.dumps(now, indent=2) + "\n")
    return True


def _judged(selected: int | None, method: Method) -> int:
    """The exit code: a method that selects, and selected nothing, has forgotten nothing."""
    if selected or not method.knob:
        return 0
    say(f"NOTHING WAS FORGOTTEN: {method.name} selected no weight; the report says why")
    return 1


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
