"""Small charts as SVG for a page that needs no script and no network, and for files.

Every chart is 440 units wide, so that its letters can still be read on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deepclean_hooks.report.printable import printable

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 14, 46


def _shown(value: object) -> object:
    """What stands for a value in a template, which then escapes markup in it."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Line:
    """A line of a chart: its points (x, y), its name in the legend and its colour."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with ticks (value, text); logarithmic if `log`."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, 0 to 1."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low) if high > low else 0.5

    def along(self, start: float, end: float) -> list[tuple[float, str]]:
        """The ticks, placed between two coordinates."""
        return [(start + self.at(value) * (end - start), text) for value, text in self.ticks]


def chart(lines: Sequence[Line], x: Axis, y: Axis, *, title: str) -> Markup:
    """Lines over two axes, with a legend below."""
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    paths = [
        " ".join(
            f"{left + x.at(a) * (right - left):.1f},{bottom + y.at(b) * (top - bottom):.1f}"
            for a, b in line.points
        )
        for line in lines
    ]
    return _drawn(
        "chart.svg",
        title=title,
        drawn=list(zip(lines, paths, strict=True)),
        x=x.label,
        y=y.label,
        x_ticks=x.along(left, right),
        y_ticks=y.along(bottom, top),
        frame=(left, right, top, bottom),
        height=HEIGHT,
    )


def bars(rows: Sequence[tuple[str, float, str]], *, title: str, colour: str) -> Markup:
    """Horizontal bars: (name, share of 0 to 1, text beside it)."""
    shown = [
        (name if len(name) <= 27 else f"...{name[-25:]}", max(0.0, min(share, 1.0)), text)
        for name, share, text in rows
    ]
    return _drawn("bars.svg", title=title, rows=shown, colour=colour)


def _drawn(template: str, **values: object) -> Markup:
    return Markup(TEMPLATES.get_template(template).render(width=WIDTH, **values))


def steps(counts: Sequence[float], edges: Sequence[float]) -> list[tuple[float, float]]:
    """The outline of a histogram as points of a line."""
    points = [(edges[0], 0.0)]
    for i, count in enumerate(counts):
        points += [(edges[i], count), (edges[i + 1], count)]
    return [*points, (edges[-1], 0.0)]


def percent(label: str) -> Axis:
    """An axis from 0 to 100 per cent."""
    return Axis(label, 0, 100, [(value, f"{value} %") for value in range(0, 101, 25)])
