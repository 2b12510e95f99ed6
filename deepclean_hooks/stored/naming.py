"""Which tensor of a file is which of the model: wrappers and libraries rename them on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Segments that a wrapper puts into a name, wherever it wraps.
_WRAPPERS = {
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}


@dataclass(frozen=True)
class Naming:
    """`model`: the model's name for each name in the file that has a counterpart; `renamed`: those
    that only their content identifies, as (file's name, model's name)."""

    model: dict[str, str]
    renamed: tuple[tuple[str, str], ...] = ()


def naming(stored: Mapping[str, str], ours: Mapping[str, str]) -> Naming:
    """Names of a file's tensors against the model's, both with the digests of their content.

    A name that differs by wrappers or by a prefix of all names is recognised whatever the content.
    What is left is matched by content, where each tensor serves once, and only by renamings that a
    library could do: each pattern of names for one other pattern, with the same numbers in the same
    order. So two layers that were exchanged do not match.
    """
    model = by_name(list(stored), list(ours))
    taken = set(model.values())
    left = [name for name in stored if name not in model]
    open_names = [name for name in ours if name not in taken]
    pairs = _by_content(
        {name: stored[name] for name in left}, {name: ours[name] for name in open_names}
    )
    return Naming({**model, **dict(pairs)}, tuple(pairs))


def plain(name: str) -> str:
    """The name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def by_name(stored: list[str], ours: list[str]) -> dict[str, str]:
    """The model's name for each name in a file that differs from it by wrappers or by a prefix of
    all names."""
    best: dict[str, str] = {}
    for mine in _without_prefix(stored):
        for theirs in _without_prefix(ours):
            model = {short: name for name, short in theirs.items()}
            hits = {name: model[short] for name, short in mine.items() if short in model}
            if len(hits) > len(best):
                best = hits
    return best


def _without_prefix(names: list[str]) -> Iterable[dict[str, str]]:
    """The names in plain form, then without the first part that all share, and so on."""
    parts = {name: plain(name).split(".") for name in names}
    if len({tuple(p) for p in parts.values()}) < len(names):
        parts = {name: name.split(".") for name in names}  # two would become the same
    cut = 0
    while True:
        yield {name: ".".join(p[cut:]) for name, p in parts.items()}
        if len({p[cut] for p in parts.values()}) != 1 or any(
            len(p) < cut + 2 for p in parts.values()
        ):
            return
        cut += 1


def _by_content(stored: Mapping[str, str], ours: Mapping[str, str]) -> list[tuple[str, str]]:
    of_digest: dict[str, list[str]] = {}
    for name in sorted(ours):
        of_digest.setdefault(ours[name], []).append(name)
    counts = Counter(stored.values())
    sure, alike = [], []
    for name in sorted(stored):
        names = of_digest.get(stored[name], [])
        if len(names) == counts[stored[name]] == 1:
            sure.append((name, names[0]))
        elif names:
            alike.append((name, names.pop(0)))  # of equal tensors any may stand for any
    return [*_consistent(sure), *alike]


def _consistent(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    there: dict[str, set[str]] = {}
    back: dict[str, set[str]] = {}
    for stored, model in pairs:
        there.setdefault(_pattern(stored)[0], set()).add(_pattern(model)[0])
        back.setdefault(_pattern(model)[0], set()).add(_pattern(stored)[0])
    return [
        (stored, model)
        for stored, model in pairs
        if _pattern(stored)[1] == _pattern(model)[1]
        and len(there[_pattern(stored)[0]]) == len(back[_pattern(model)[0]]) == 1
    ]


def _pattern(name: str) -> tuple[str, tuple[str, ...]]:
    """The name with its numbers taken out, and the numbers."""
    parts = name.split(".")
    numbers = tuple(part for part in parts if part.isdigit())
    return ".".join("#" if part.isdigit() else part for part in parts), numbers
