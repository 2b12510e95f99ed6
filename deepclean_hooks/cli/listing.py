"""`methods`: what there is, with settings and sources."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from dataclasses import dataclass, field
from typing import Annotated

from deepclean_hooks.cli.request import say
from deepclean_hooks.methods.named import is_required, table


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the methods with their settings; with a name, all that is said of it."""

    name: Annotated[list[str], "only these, with their sources"] = field(default_factory=list)


def methods(given: Methods) -> int:
    """0 once they are listed; raises ValueError for a name that is no method's."""
    known = table()
    for name in given.name or known:
        if name not in known:
            raise ValueError(f"{name!r} is no method; there are {', '.join(known)}")
        kind = known[name]
        settings = ", ".join(
            f.name if is_required(f) else f"{f.name}={_shown(f)}"
            for f in dataclasses.fields(kind)  # type: ignore[arg-type]  # every method is a dataclass
            if f.init
        )
        text = inspect.getdoc(kind) or ""
        say(f"{name}({settings})")
        if given.name:
            source = inspect.getdoc(sys.modules[kind.__module__]) or ""
            say(f"\n{text}\n\nSource: {source}\n")
        else:
            say(f"    {' '.join(text.split(chr(10) * 2)[0].split())}")
    return 0


def _shown(field: dataclasses.Field[object]) -> str:
    made = field.default_factory
    return repr(field.default) if made is dataclasses.MISSING else repr(made())
