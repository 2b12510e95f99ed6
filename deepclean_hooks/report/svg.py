"""Small charts as SVG text for a page that needs no script and no network.

Every chart is 440 units wide, so that its letters can still be read on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 14, 46
_LEGEND_LINE = 18


@dataclass(frozen=True)
class Line:
    """One line of a chart: its points (x, y), its name in the legend and its colour."""

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


def chart(lines: Sequence[Line], x: Axis, y: Axis, *, title: str) -> str:
    """Lines over two axes, with a legend below."""
    rows = math.ceil(len(lines) / 2)
    height = HEIGHT + rows * _LEGEND_LINE

    def px(value: float) -> float:
        return LEFT + x.at(value) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - y.at(value) * (HEIGHT - TOP - BOTTOM)

    parts = [_open(height, title)]
    for value, text in x.ticks:
        parts.append(
            f'<line x1="{px(value):.1f}" x2="{px(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            'stroke="#e3e6ea"/>'
            f'<text x="{px(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
            f"{escape(text)}</text>"
        )
    for value, text in y.ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(value):.1f}" y2="{py(value):.1f}" '
            'stroke="#e3e6ea"/>'
            f'<text x="{LEFT - 6}" y="{py(value) + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        )
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{middle_x}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x.label)}</text>'
        f'<text transform="translate(12 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text>"
    )
    for i, line in enumerate(lines):
        path = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in line.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2.2"'
            f"{_dash(line)}/>"
        )
        parts.append(_legend(line, i))
    return "".join(parts) + "</svg>"


def steps(counts: Sequence[float], edges: Sequence[float]) -> list[tuple[float, float]]:
    """The outline of a histogram as points of a line."""
    points = [(edges[0], 0.0)]
    for i, count in enumerate(counts):
        points += [(edges[i], count), (edges[i + 1], count)]
    return [*points, (edges[-1], 0.0)]


def bars(rows: Sequence[tuple[str, float, str]], *, title: str, colour: str) -> str:
    """Horizontal bars: (name, share of 0 to 1, text beside it)."""
    line, label, room = 19, 190, 66
    height = line * len(rows) + 8
    parts = [_open(height, title)]
    for i, (name, share, text) in enumerate(rows):
        y = 4 + i * line
        length = max(0.0, min(share, 1.0)) * (WIDTH - label - room)
        shown = name if len(name) <= 27 else f"...{name[-25:]}"
        parts.append(
            f'<text x="{label - 6}" y="{y + 13}" text-anchor="end">{escape(shown)}</text>'
            f'<rect x="{label}" y="{y + 2}" width="{WIDTH - label - room}" height="13" '
            'fill="#eef1f4"/>'
            f'<rect x="{label}" y="{y + 2}" width="{length:.1f}" height="13" fill="{colour}"/>'
            f'<text x="{WIDTH - room + 6}" y="{y + 13}">{escape(text)}</text>'
        )
    return "".join(parts) + "</svg>"


def _open(height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg" font-size="12.5" fill="#39424e">'
    )


def _dash(line: Line) -> str:
    return ' stroke-dasharray="6 4"' if line.dashed else ""


def _legend(line: Line, index: int) -> str:
    x = 16 + (index % 2) * (WIDTH - 16) / 2
    y = HEIGHT + (index // 2) * _LEGEND_LINE + 8
    return (
        f'<line x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}" stroke="{line.colour}" '
        f'stroke-width="3"{_dash(line)}/><text x="{x + 28}" y="{y + 4}">{escape(line.name)}</text>'
    )
