"""Does a report fit the model it is said to be of? Digests and what can be recomputed cheaply."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deepclean_hooks.report.rows import figures_of
from deepclean_hooks.stored import bits, checkpoint

SCHEMAS = (2,)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `right` is None where it could not be."""

    what: str
    right: bool | None
    found: str

    def __str__(self) -> str:
        """A line with the outcome first."""
        word = {True: "ok      ", False: "MISMATCH", None: "skipped "}[self.right]
        return f"{word} {self.what}: {self.found}"


def verify(
    report: Mapping[str, Any],
    after: Mapping[str, Tensor],
    before: Mapping[str, Tensor] | None = None,
) -> list[Check]:
    """Every check of a report (as `Report.to_dict()`) against the tensors of the unlearned model's
    checkpoint and, if it is at hand, of the original's."""
    if report.get("schema") not in SCHEMAS:
        found = f"{report.get('schema')!r}, known: {', '.join(map(str, SCHEMAS))}"
        return [Check("schema", False, found)]
    finished = Check("the run is finished", report["phase"] == "finished", report["phase"])
    checks = [Check("schema", True, str(report["schema"])), finished, *_arithmetic(report)]
    checks += _digests("unlearned model", report["checkpoint_after"], after)
    checks += _entries(report, after)
    if before is None:
        checks.append(
            Check("what changed", None, "pass --original with the checkpoint of the original model")
        )
    else:
        checks += _digests("original model", report["checkpoint_before"], before)
        checks += _changes(report, before, after)
    return checks


def _arithmetic(report: Mapping[str, Any]) -> Iterator[Check]:
    """What a report says in two places must be the same in both."""
    layers = report["layers"]
    selected, entries = (sum(layer[key] for layer in layers) for key in ("selected", "entries"))
    yield _equal("selected entries, layer by layer", selected, report["selected_entries"])
    yield _equal("trainable entries, layer by layer", entries, report["trainable_entries"])
    may_change = sum(map(_may_change, layers))
    told = report.get("may_change_entries")
    yield _equal("entries that may change, layer by layer", may_change, told)
    wrong = [
        layer["name"]
        for layer in layers
        if not layer["selected"] <= _may_change(layer) <= layer["entries"]
    ]
    fits = ", ".join(wrong[:3]) or "in every layer"
    yield Check("selected entries are among those that may change", not wrong, fits)
    if report["selected_fraction"] is not None and entries:
        fraction = report["selected_fraction"]
        yield Check(
            "selected fraction", math.isclose(fraction, selected / entries), f"{fraction:.6f}"
        )
    yield _equal("frozen entries that moved", 0, report["frozen_entries_moved"])
    hashes = report["forgotten"].get("hashes", [])
    yield _equal("hashes of forgotten samples", len(hashes), report["forget_samples"])
    after = report["scores"].get("after")
    if isinstance(after, Mapping) and after.get("gaps"):
        yield _gaps(after)


def _may_change(layer: Mapping[str, Any]) -> int:
    """Of a report from before this was told: in such a run only what was selected was free."""
    return int(layer.get("may_change", layer["selected"]))


def _gaps(after: Mapping[str, Any]) -> Check:
    own = figures_of(after)
    wrong = [
        name
        for name, gap in after["gaps"].items()
        if name not in own
        or name not in after["spread"]
        or not math.isclose(own[name] - after["spread"][name]["mean"], gap, abs_tol=1e-6)
    ]
    found = f"wrong: {', '.join(wrong[:3])}" if wrong else f"{len(after['gaps'])} gaps"
    return Check("gaps are figure minus gold", not wrong, found)


def _equal(what: str, found: object, told: object) -> Check:
    if told is None:
        return Check(what, None, "the report has no such figure")
    return Check(what, found == told, str(found) if found == told else f"{found}, told {told}")


def _digests(which: str, told: Mapping[str, str], state: Mapping[str, Tensor]) -> Iterator[Check]:
    if not told:
        yield Check(f"tensors of the {which}", False, "the report has no digests of them")
        return
    found = checkpoint.digests(state)
    # Files that store a tied tensor once leave its other names out.
    absent = [n for n in told if n not in found and told[n] not in found.values()]
    other = [name for name in found if name not in told]
    differing = [name for name in found if name in told and found[name] != told[name]]
    for words, names in (
        ("missing in the checkpoint", absent),
        ("not in the report", other),
        ("with other content", differing),
    ):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            yield Check(f"tensors of the {which}", False, f"{len(names)} {words}: {shown}")
    if not (absent or other or differing):
        yield Check(f"tensors of the {which}", True, f"{len(found)} with the digests of the report")


def _entries(report: Mapping[str, Any], state: Mapping[str, Tensor]) -> Iterator[Check]:
    wrong = [
        layer["name"]
        for layer in report["layers"]
        if layer["name"] in state and state[layer["name"]].numel() != layer["entries"]
    ]
    yield Check("sizes of the layers", not wrong, ", ".join(wrong[:3]) or "as in the checkpoint")


def _changes(
    report: Mapping[str, Any], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[Check]:
    """No more entries of a layer may differ than were selected or free, and none of the others."""
    names = _tied(report)
    before, after = ({names.get(n, n): t for n, t in state.items()} for state in (before, after))
    open_to = {layer["name"]: _may_change(layer) for layer in report["layers"]}
    changed = {name: _differing(before[name], after[name]) for name in before if name in after}
    weights = {name: count for name, count in changed.items() if name in open_to}
    wrong = [f"{n} ({c} changed, {open_to[n]} might)" for n, c in weights.items() if c > open_to[n]]
    total = sum(weights.values())
    told = f"{total} weights differ, no more in any layer than were selected or free to train there"
    yield Check("changed weights", not wrong, ", ".join(wrong[:3]) or told)
    rest = [name for name, count in changed.items() if count and name not in open_to]
    if report["norm_statistics"] == "freeze":
        yield Check("all else", not rest, ", ".join(rest[:3]) or "unchanged, bit for bit")
    else:
        note = f"{len(rest)} buffers changed, which norm_statistics='update' allows"
        fixed = [name for name in rest if not _is_statistic(name)]
        yield Check("all else", not fixed, ", ".join(fixed[:3]) or note)


def _tied(report: Mapping[str, Any]) -> dict[str, str]:
    """The name under which the report lists a tensor that a state_dict has under two names."""

    def content(name: str) -> tuple[str | None, str | None]:
        return report["checkpoint_before"].get(name), report["checkpoint_after"].get(name)

    listed = {content(layer["name"]): layer["name"] for layer in report["layers"]}
    own = set(listed.values())
    others = (name for name in report["checkpoint_after"] if name not in own)
    return {name: listed[content(name)] for name in others if content(name) in listed}


def _differing(one: Tensor, other: Tensor) -> int:
    if one.shape != other.shape or one.dtype != other.dtype:
        return max(one.numel(), other.numel())
    return int(bits.differing(one.contiguous(), other.contiguous()).sum())


def _is_statistic(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")
