"""The curves of gamma, of the paper's Figures 3 and 4, for the page and for files: read from
`GammaSweep.to_dict()`."""

from __future__ import annotations

import os
from pathlib import Path

from markupsafe import Markup

from deepclean_hooks.report.stored_report import Document
from deepclean_hooks.report.svg import Axis, Line, chart, percent
from deepclean_hooks.stored.files import write_text

MOST_LAYERS = 12
SETS = {
    "retain": ("data kept", "#2b8a3e"),
    "forget": ("forgotten data", "#c4572b"),
    "test": ("new data", "#77808b"),
    "forget_test": ("new data like the forgotten", "#b8860b"),
}
_PALETTE = ("#1d5fa8", "#c4572b", "#2b8a3e", "#8a4fa3", "#b8860b", "#4c9aa8")


def selection(sweep: Document) -> Markup:
    """The selected share of each parameter against gamma; all together in black."""
    names = list(sweep["entries"])
    step = -(-len(names) // MOST_LAYERS)  # of many layers every step-th
    lines = [
        Line(
            name if len(name) <= 27 else f"...{name[-25:]}",
            _PALETTE[i % len(_PALETTE)],
            [
                (point["gamma"], 100 * point["selected"].get(name, 0) / sweep["entries"][name])
                for point in sweep["points"]
            ],
            dashed=i >= len(_PALETTE),
        )
        for i, name in enumerate(names[::step])
    ]
    total = sum(sweep["entries"].values())
    whole = [(point["gamma"], 100 * point["selected_entries"] / total) for point in sweep["points"]]
    lines.append(Line("all that may be selected", "#1f2730", whole))
    title = "selected share of each parameter"
    return chart(lines, _gamma(sweep), percent("selected entries"), title=title)


def behaviour(sweep: Document) -> Markup | None:
    """The accuracy on each set against gamma: dashed with W_f at 0, full after the fine-tune; None
    where the sweep has no scores."""
    points = sweep["points"]
    lines = []
    for kind, words in (("zeroed", "W_f at 0"), ("tuned", "fine-tuned")):
        for name, (label, colour) in SETS.items():
            values = [(point["gamma"], point[kind].get(f"{name}.accuracy")) for point in points]
            if all(value is not None for _, value in values):
                lines.append(Line(f"{label}, {words}", colour, values, dashed=kind == "zeroed"))
    if not points or not lines:
        return None
    return chart(lines, _gamma(sweep), percent("accuracy"), title="accuracy against gamma")


def write(drawing: Markup, path: str | os.PathLike[str]) -> None:
    """Writes an SVG file, whole or not at all; raises ValueError for a name that is not .svg."""
    where = Path(path)
    if where.suffix != ".svg":
        raise ValueError(
            f"curves are written as .svg, got {where.name!r}; for another format draw the sweep's "
            "to_dict() with a plotting library"
        )
    write_text(where, drawing)


def _gamma(sweep: Document) -> Axis:
    gammas = [point["gamma"] for point in sweep["points"]]
    ticks = [(gamma, f"{gamma:g}") for gamma in gammas]
    return Axis("gamma", min(gammas), max(gammas), ticks, log=True)
