"""`measure`: the Fisher diagonal of the training data, for later requests; `sweep`: what each gamma
would select."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from deepclean_hooks.cli.request import (
    METHOD,
    RequestOptions,
    SourceOptions,
    asked,
    read,
    say,
    source,
)
from deepclean_hooks.measure.fisher import fisher_diagonal
from deepclean_hooks.stored.files import require_folder_of, write_text
from deepclean_hooks.tuning.gamma_sweep import GAMMAS, gamma_sweep


@dataclass(frozen=True, kw_only=True)
class Measure(SourceOptions):
    """Measure the training data once, so that each later request measures its own samples only."""

    output: Annotated[Path, "the file, for `forget --measured`: .safetensors"]


@dataclass(frozen=True, kw_only=True)
class Sweep(RequestOptions):
    """Show how much each gamma would select, and what the model would still know."""

    output: Annotated[Path | None, "a JSON file of all figures"] = None
    gammas: Annotated[list[float], "the values", 0] = field(default_factory=lambda: list(GAMMAS))
    method: Annotated[str, METHOD] = "DeepClean"
    scores: Annotated[bool, "also score the model without the selected weights"] = True


def measure(given: Measure) -> int:
    """0 once the file is written."""
    require_folder_of(given.output)
    request = source(given)
    found = fisher_diagonal(
        request.loaded.model, read(request.data, given), batch_size=given.batch_size
    )
    found.save(given.output)
    say(f"{found.count} samples measured: {given.output}")
    return 0


def sweep(given: Sweep) -> int:
    """0 once the figures are told."""
    if given.output is not None:
        require_folder_of(given.output)
    request = asked(given)
    found = gamma_sweep(
        request.loaded.model,
        request.sets["forget"],
        request.sets["retain"],
        gammas=given.gammas,
        method=request.method(given.method),
        scores=given.scores,
        test=request.sets.get("test"),
        batch_size=given.batch_size,
    )
    if given.output is not None:
        write_text(given.output, json.dumps(found.to_dict(), indent=2) + "\n")
    say(str(found))
    return 0
