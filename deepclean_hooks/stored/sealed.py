"""A run's state with what proves that it, and the weights it belongs to, came back as they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepclean_hooks.stored import bits
from deepclean_hooks.stored.checkpoint import model_digest
from deepclean_hooks.stored.files import written_whole

_FORMAT = "deepclean-hooks run 2"
_EARLIER = "deepclean-hooks run 1"


class BrokenRun(ValueError):
    """A stored run that is missing, altered, or not of the weights that were loaded."""


def seal(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A session's `state_dict()` with its digest and that of the model's state, as they are now.

    Tensors, numbers and strings only, so that torch.load(weights_only=True) reads it back.
    """
    return {
        "format": _FORMAT,
        "run": dict(state),
        "digest": _digest(state),
        "model": model_digest(model),
    }


def opened(sealed: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The session's state again; raises BrokenRun if it was altered. `where` is for the error."""
    if sealed.get("format") == _EARLIER:
        raise BrokenRun(
            f"the run in {where} was stored by an earlier version, whose digests of the weights "
            "differ; finish it with that version"
        )
    if sealed.get("format") != _FORMAT or not isinstance(sealed.get("run"), Mapping):
        raise BrokenRun(f"{where} holds no unlearning run (format {sealed.get('format')!r})")
    run: dict[str, Any] = dict(sealed["run"])
    if _digest(run) != sealed.get("digest"):
        raise BrokenRun(f"the unlearning run in {where} was altered: its digest does not fit")
    return run


def write(sealed: Mapping[str, Any], path: Path) -> None:
    """Writes the file whole or not at all."""
    with written_whole(path) as temporary:
        torch.save(dict(sealed), temporary)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote; raises BrokenRun if there is no such file or it cannot be read."""
    if not path.is_file():
        raise BrokenRun(f"{path} is missing")
    try:
        sealed: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # torch.load has no error of its own for a damaged file
        raise BrokenRun(f"{path} is damaged: {reason}") from reason
    if not isinstance(sealed, dict):
        raise BrokenRun(f"{path} holds no unlearning run")
    return sealed


def _digest(state: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key not in ("free", "term")}
    tensors = {**state["free"], **{f"term {n}": t for n, t in state.get("term", {}).items()}}
    text = json.dumps(rest, sort_keys=True, default=repr)
    return hashlib.sha256((text + bits.digest(tensors)).encode()).hexdigest()
