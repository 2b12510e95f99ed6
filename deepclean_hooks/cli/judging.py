"""`evaluate`: a checkpoint beside golds; `compare`: several methods on one request, on one page."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from deepclean_hooks.cli.request import (
    METHOD,
    RequestOptions,
    TrainingOptions,
    asked,
    is_first,
    say,
)
from deepclean_hooks.integrations.recipe import unlearn
from deepclean_hooks.metrics.evaluate import evaluate as scores_of
from deepclean_hooks.report.report import Report
from deepclean_hooks.stored.files import require_folder_of, write_text


@dataclass(frozen=True, kw_only=True)
class Evaluate(RequestOptions):
    """Score any checkpoint on the forget, retain and test data, beside retrained models."""

    output: Annotated[Path | None, "a JSON file of all figures"] = None


@dataclass(frozen=True, kw_only=True)
class Compare(TrainingOptions, RequestOptions):
    """Run several methods on the same request, and put them side by side on one page."""

    methods: Annotated[list[str], METHOD]
    output: Annotated[Path, "the folder of the page and of each method's report"]


def evaluate(given: Evaluate) -> int:
    """0 once the figures are told."""
    if given.output is not None:
        require_folder_of(given.output)
    request = asked(given)
    sets = {name: part for name, part in request.sets.items() if name != "held_out"}
    found = scores_of(
        request.loaded.model, **sets, gold=request.golds or None, batch_size=given.batch_size
    )
    if given.output is not None:
        write_text(given.output, json.dumps(found.to_dict(), indent=2) + "\n")
    say(str(found))
    return 0


def compare(given: Compare) -> int:
    """0 once the page is written; the original model is left as it is."""
    training = given.training()
    request = asked(given)
    methods = {text: request.method(text) for text in given.methods}
    found: dict[str, dict[str, Any]] = {}
    report: Report | None = None
    for number, (text, method) in enumerate(methods.items(), 1):
        say(f"{text} ({number} of {len(methods)})")
        torch.manual_seed(given.seed)
        report = unlearn(
            copy.deepcopy(request.loaded.model),
            request.sets["forget"],
            request.sets["retain"],
            method=method,
            **training,
            folder=given.output / f"{number}-{type(method).__name__}",
            test=request.sets.get("test"),
            gold=request.golds or None,
            batch_size=given.batch_size,
        )
        scores = report.scores["after"]
        if isinstance(scores, str):
            raise ValueError(f"{text} cannot be compared: {scores}")
        found[text] = scores
    if report is not None and is_first():
        page = given.output / "compare.html"
        write_text(page, report.to_html(compared=found))
        say(f"page: {page}")
    return 0
