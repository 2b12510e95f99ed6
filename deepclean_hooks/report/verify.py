"""Does a report fit the model it is said to be of? Digests and what can be recomputed cheaply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deepclean_hooks.report import stored_report
from deepclean_hooks.report.check import Check, listed, none_of
from deepclean_hooks.report.consistency import (
    RETURNED,
    RETURNED_HALF,
    consistent,
    digest_of_all,
    own_digest,
)
from deepclean_hooks.report.stored_report import Document
from deepclean_hooks.stored import bits, checkpoint
from deepclean_hooks.stored.naming import naming

# What a report says that is compared with the files or with itself; all else is its word alone.
VOUCHED = frozenset(
    {
        "schema",
        "phase",
        "layers",
        "trainable_entries",
        "selected_entries",
        "selected_fraction",
        "may_change_entries",
        "model_before",
        "model_after",
        "checkpoint_before",
        "checkpoint_after",
        "restored_entries",
        "digest",
    }
)


def verify(
    report: Document, after: Any, before: Any = None, *, state: str | None = None
) -> list[Check]:
    """Every check of a report (as `Report.to_dict()`) against what the unlearned model's checkpoint
    file holds (a state_dict, or a container with one or several) and, if it is at hand, the
    original's.

    Every state_dict of the model in a file must be right; `state` names the only one to look at, by
    its place in the file. Raises ValueError for a malformed report.
    """
    try:
        current = stored_report.checked(report)
    except stored_report.UnknownSchema as reason:
        return [Check("schema", False, str(reason))]
    checks = [
        Check("schema", True, str(current["schema"])),
        Check("the run is finished", current["phase"] == "finished", current["phase"]),
        own_digest(report),
        *consistent(current),
        *digest_of_all(current, "before"),
        *digest_of_all(current, "after"),
    ]
    ours = _Side("unlearned model", "after", current, after, state)
    checks += ours.checks
    checks += _entries(current, ours.tensors)
    checks.append(ours.originals())
    if before is None:
        words = "pass --original with the checkpoint of the original model"
        checks.append(Check("what changed", None, words))
        return checks
    theirs = _Side("original model", "before", current, before, None)
    checks += theirs.checks
    checks += _changes(current, theirs.tensors, ours.tensors)
    checks += _returned(current, theirs.tensors, ours.tensors)
    return checks


def unvouched(report: Document) -> list[str]:
    """The fields of a report that no check can confirm: an altered one would pass."""
    return [
        name
        for name, value in report.items()
        if name not in VOUCHED and value not in (None, {}, ())
    ]


class _Side:
    """One file against the report: its checks, and its tensors under the model's names, where a
    tied tensor has its first one."""

    def __init__(
        self, which: str, when: str, report: Document, loaded: Any, state: str | None
    ) -> None:
        self.which, self.report, self.loaded = which, report, loaded
        self.reported: Mapping[str, str] = report[f"checkpoint_{when}"]
        self.tied = _alike(report) if report["tied"] is None else report["tied"]
        self.tensors: dict[str, Tensor] = {}
        self.checks: list[Check] = []
        self._digests: dict[int, str] = {}
        if not self.reported:
            words = "the report has no digests of them"
            self.checks.append(Check(f"tensors of the {which}", False, words))
            return
        for place, tensors in self._of_the_model(state).items():
            self._compare(place, tensors)

    def digest(self, tensor: Tensor) -> str:
        """SHA-256 of a tensor of the file, computed once."""
        if id(tensor) not in self._digests:
            self._digests[id(tensor)] = bits.tensor_digest(tensor)
        return self._digests[id(tensor)]

    def originals(self) -> Check:
        """No tensor anywhere in the file may be one of the original's that the run changed."""
        known = {digest: name for name, digest in self.report["checkpoint_before"].items()}
        changed = known.keys() - set(self.report["checkpoint_after"].values())
        wrong = [
            f"{known[self.digest(tensor)]} under {place!r}"
            for place, tensor in checkpoint.walk(self.loaded)
            if isinstance(tensor, Tensor) and _says_something(tensor)
            if self.digest(tensor) in changed
        ]
        return none_of("weights of the original in the file", wrong, "none that the run changed")

    def _of_the_model(self, state: str | None) -> dict[str, dict[str, Tensor]]:
        """Each state_dict of the file that has weights of this model."""
        every = checkpoint.states(self.loaded)
        if not every:
            raise ValueError(f"the file of the {self.which} holds no state_dict: no named tensor")
        if state is not None:
            if state not in every:
                places = ", ".join(map(repr, every))
                raise ValueError(f"no state_dict stands under {state!r}; there are {places}")
            return {state: every[state]}
        fitting = {place: held for place, held in every.items() if self._fits(held)}
        return fitting or dict([max(every.items(), key=lambda item: len(item[1]))])

    def _fits(self, tensors: Mapping[str, Tensor]) -> bool:
        # Masks and counts of a stored run may have the names of weights.
        weights = {name: "" for name, tensor in tensors.items() if tensor.is_floating_point()}
        if naming(weights, self.reported).model:
            return True
        known = set(self.reported.values())
        return any(_says_something(t) and self.digest(t) in known for t in tensors.values())

    def _compare(self, place: str, tensors: Mapping[str, Tensor]) -> None:
        what = f"tensors of the {self.which}" + (f" under {place!r}" if place else "")
        stored = {name: self.digest(tensor) for name, tensor in sorted(tensors.items())}
        names = naming(stored, self.reported)
        by_name = {model: name for name, model in names.model.items()}
        absent = self._absent(set(by_name))
        strange = [name for name in stored if name not in names.model]
        differing = [n for n, name in by_name.items() if stored[name] != self.reported[n]]
        left_out = [] if strange or differing else self._left_out(absent, set(by_name))
        if not self.tensors:
            self.tensors = {self.tied.get(n, n): tensors[name] for n, name in by_name.items()}
        for words, wrong in (
            ("missing in the checkpoint", [] if left_out else absent),
            ("not in the report", strange),
            ("with other content", differing),
        ):
            if wrong:
                self.checks.append(Check(what, False, f"{len(wrong)} {words}: {listed(wrong)}"))
        if left_out:
            words = f"the file lacks {len(left_out)} tensors that the run left as they were"
            self.checks.append(Check(what, None, f"{words}: {listed(left_out)}"))
        elif absent or strange or differing:
            return
        words = f"{len(stored)} with the digests of the report"
        if names.renamed:
            there, here = names.renamed[0]
            words += f", {len(names.renamed)} under other names, such as {there} for {here}"
        self.checks.append(Check(what, True, words))

    def _absent(self, present: set[str]) -> list[str]:
        """What is in no form in the file. A tied tensor that is stored once is there."""
        there = {self.tied.get(name, name) for name in present}
        return [name for name in self.reported if self.tied.get(name, name) not in there]

    def _left_out(self, absent: list[str], present: set[str]) -> list[str]:
        """The absent ones, if the file is that of an adapter: all that was trained and no more."""
        trained = {layer["name"] for layer in self.report["layers"]}
        before, after = self.report["checkpoint_before"], self.report["checkpoint_after"]
        unchanged = all(before.get(name) == after.get(name) for name in absent)
        frozen = any(not _is_statistic(name) for name in absent)
        adapter = present <= trained and not trained & set(absent) and frozen
        return absent if adapter and unchanged and present else []


def _alike(report: Document) -> dict[str, str]:
    """Of a report of schema 2, which does not say what is tied: a name that is no layer and has
    before and after the digests of a layer, and of one only."""
    before, after = report["checkpoint_before"], report["checkpoint_after"]
    listed: dict[Any, list[str]] = {}
    for layer in report["layers"]:
        content = before.get(layer["name"]), after.get(layer["name"])
        listed.setdefault(content, []).append(layer["name"])
    layers = {name for names in listed.values() for name in names}
    tied = {}
    for name in after:
        names = listed.get((before.get(name), after[name]), [])
        if name not in layers and len(names) == 1 and not _is_statistic(name):
            tied[name] = names[0]
    return tied


def _says_something(tensor: Tensor) -> bool:
    """Entries with bits that are not all equal: a bias of zeros may stand anywhere."""
    if (
        tensor.numel() < 2
        or tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.is_meta
    ):
        return False
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).view(tensor.numel(), -1)
    return bool((flat != flat[0]).any())


def _entries(report: Document, state: Mapping[str, Tensor]) -> Iterator[Check]:
    wrong = [
        layer["name"]
        for layer in report["layers"]
        if layer["name"] in state and state[layer["name"]].numel() != layer["entries"]
    ]
    yield none_of("sizes of the layers", wrong, "as in the checkpoint")


def _changes(
    report: Document, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[Check]:
    """No more entries of a layer may differ than were selected or free, and none of the others."""
    open_to = {layer["name"]: layer["may_change"] for layer in report["layers"]}
    changed = {name: _differing(before[name], after[name]) for name in before if name in after}
    weights = {name: count for name, count in changed.items() if name in open_to}
    wrong = [f"{n} ({c} changed, {open_to[n]} might)" for n, c in weights.items() if c > open_to[n]]
    words = "weights differ, no more in any layer than were selected or free to train there"
    yield none_of("changed weights", wrong, f"{sum(weights.values())} {words}")
    rest = [name for name, count in changed.items() if count and name not in open_to]
    if report["norm_statistics"] == "freeze":
        yield none_of("all else", rest, "unchanged, bit for bit")
    else:
        note = f"{len(rest)} buffers changed, which norm_statistics='update' allows"
        yield none_of("all else", [name for name in rest if not _is_statistic(name)], note)


def _returned(
    report: Document, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[Check]:
    """How many entries of W_f hold their original value again, at least: as many as were selected
    in a layer and cannot be among those that differ. Entries that were 0 do not count."""
    what = "W_f is not what it was before"
    back: dict[str, int] = {}
    most: dict[str, float] = {}
    for layer in report["layers"]:
        name, selected = layer["name"], layer["selected"]
        if selected and name in before and name in after:
            tensor = before[name]
            same = selected - _differing(tensor, after[name]) - int((tensor == 0).sum())
            back[name] = max(same, 0)
            most[name] = RETURNED * selected + (RETURNED_HALF if tensor.element_size() < 4 else 0)
    total = sum(back.values())
    if report["effect"] == "reset to 0":
        wrong = [f"{name} ({count} entries)" for name, count in back.items() if count > most[name]]
        words = f"{total} entries hold their original value"
        yield Check(what, not wrong, f"{words}: {listed(wrong)}" if wrong else f"at least {words}")
    elif back:
        same = total > 0 and total == report["selected_entries"]
        words = f"entries that were {report['effect']}"
        yield Check(what, None if not same else False, f"{total} {words} hold their original value")


def _differing(first: Tensor, second: Tensor) -> int:
    if first.shape != second.shape or first.dtype != second.dtype:
        return max(first.numel(), second.numel())
    return int(bits.differing(first.contiguous(), second.contiguous()).sum())


def _is_statistic(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")
