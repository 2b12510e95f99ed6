"""A run that is stored after the reset and taken up again: what is in its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deepclean_hooks import ranks
from deepclean_hooks.methods.method import Method
from deepclean_hooks.report.report import Report
from deepclean_hooks.run.phases import WasReset
from deepclean_hooks.stored import bits, masks

FORMAT = "deepclean-hooks session 2"
_PARTS = (
    *("method", "free", "frozen", "changed", "report", "term"),
    *("steps", "added", "seconds", "model"),  # what changes as the loop goes on
)


def packed(at: WasReset, method: Method, report: Report) -> dict[str, Any]:
    """What of a run stays as it is from the reset on: tensors, numbers and strings only."""
    return {
        "format": FORMAT,
        "method": _named(method),
        "free": masks.pack(at.free),
        "frozen": at.frozen,
        "changed": dict(at.changed),
        "report": report.to_plain(),
        "term": {} if at.term is None else at.term.state_dict(),
    }


def method_of(state: Mapping[str, Any], method: Method) -> Method:
    """The method with the hyper-parameter that the stored run chose.

    Raises TypeError for what is no state, ValueError for a state that is no run of this version and
    of this method, or lacks a part.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            "a stored run is what run.state_dict() returned, a dict; got "
            f"{state!r:.60}; read it first, such as by torch.load(path, weights_only=True)"
        )
    if state.get("format") != FORMAT:
        raise ValueError(
            f"this is no stored run of this version (format {state.get('format')!r}, needed "
            f"{FORMAT!r}): earlier ones have no digest of the whole model, so weights that were "
            "never loaded could not be told; finish the run with the version that stored it, or "
            "begin anew from the original model"
        )
    missing = [part for part in _PARTS if part not in state]
    if missing:
        raise ValueError(
            f"the stored run lacks {', '.join(missing)}, so it is not whole; store all of "
            "run.state_dict(), or begin anew from the original model"
        )
    choice = state["report"].get("gamma_choice")
    if method.is_open and choice:
        method = method.at(choice["gamma"])
    if state["method"] != _named(method):
        raise ValueError(
            f"the stored run used {state['method']}, this session has {_named(method)}"
        )
    return method


def unpacked(
    state: Mapping[str, Any],
    method: Method,
    parameters: Mapping[str, Tensor],
    now: Mapping[str, str],
) -> WasReset:
    """What a session goes on with; `now`: the digests of the model as it is.

    Of a sharded model all ranks call this. Raises ValueError if a bit of the model differs from the
    one that was stored with the run. A state whose `model` is None is of a model that is trained on
    in the same process; its frozen entries alone are compared.
    """
    with ranks.fail_together():
        free = masks.unpack(state["free"], parameters)
    frozen = masks.frozen_digest(parameters, free, now)
    with ranks.fail_together():
        if frozen != state["frozen"] or state["model"] not in (None, bits.combined(now)):
            raise ValueError(
                "the model's weights are not those that were stored with this run; load the "
                "checkpoint's weights with strict=True before load_state_dict, check that every "
                "name was found, and store model.state_dict() and run.state_dict() at the same "
                "moment"
            )
    term = method.term()
    if term is not None:
        term.load_state_dict(state["term"])
    return WasReset(
        free,
        frozen,
        dict(state["changed"]),
        term=term,
        steps=state["steps"],
        added=state["added"],
        resumed=True,
    )


def _named(method: Method) -> dict[str, str]:
    return {"name": method.name, "settings": repr(method.settings())}
