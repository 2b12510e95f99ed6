"""What to forget: names in a file, classes, values of a column."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated

from deepclean_hooks.cli.datasets import Pictures, lines
from deepclean_hooks.data.split import Part, found_by_files, split


@dataclass(frozen=True, kw_only=True)
class WhatOptions:
    """What to forget; several together are added up."""

    forget: Annotated[
        list[Path],
        "text files, a sample a line: as much of the end of its path as names it; its id; its "
        "position where samples have neither",
    ] = field(default_factory=list)
    forget_class: Annotated[list[str], "names of classes"] = field(default_factory=list)
    forget_where: Annotated[list[str], "COLUMN=VALUE of a table; several columns must all hold"] = (
        field(default_factory=list)
    )


def chosen(data: Pictures, options: WhatOptions) -> tuple[Part, Part]:
    """(forget, retain); raises ValueError with every entry that is unknown or ambiguous, and its
    file and line."""
    if not (options.forget or options.forget_class or options.forget_where):
        raise ValueError("say what to forget: --forget FILE, --forget-class, --forget-where")
    indices: list[int] = []
    for path in options.forget:
        indices += _listed(path, data)
    where = _columns(data, options.forget_where)
    named = data.classes is not None  # labels are class indices otherwise
    classes = [c if named or not c.isdigit() else int(c) for c in options.forget_class]
    return split(data, indices=indices or None, classes=classes or None, where=where or None)


def _listed(path: Path, data: Pictures) -> list[int]:
    entries = [(number, text) for number, text in enumerate(lines(path), 1) if text]
    if data.files:
        found = found_by_files(data, [PurePath(text) for _, text in entries]) or []
    else:
        found = [
            [int(text)] if text.isdigit() and int(text) < len(data) else [] for _, text in entries
        ]
    problems = [
        f"line {number}: {text!r} names {len(at) or 'no'} sample{'s' * (len(at) > 1)}"
        for (number, text), at in zip(entries, found, strict=True)
        if len(at) != 1
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path}, {'; '.join(problems[:5])}{more} of {data.where}; correct them, none was "
            "guessed"
        )
    return [at[0] for at in found]


def _columns(data: Pictures, conditions: list[str]) -> dict[str, list[object]]:
    wanted: dict[str, list[object]] = {}
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals or not name:
            raise ValueError(f"--forget-where {condition}: write COLUMN=VALUE")
        if not data.column_names:
            raise ValueError(
                f"--forget-where {condition}: {data.where} has no columns; give a table as --data"
            )
        held = data[name] if name in data.column_names else []
        wanted.setdefault(name, []).extend({each for each in held if str(each) == value} or {value})
    return wanted
