"""Rows of figures as a table of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Row = Mapping[str, str | float | None]


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """The rows as aligned text; `columns` maps each column's name to its format, such as ".1f".

    A row's `NAME_gap`, where it has one, follows the figure of column NAME in brackets.
    """
    cells = [[_cell(row, name, form) for name, form in columns.items()] for row in rows]
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cell(row: Row, name: str, form: str) -> str:
    value, gap = row.get(name), row.get(f"{name}_gap")
    if value is None:
        return "-"
    text = value if isinstance(value, str) else format(value, form)
    return text if gap is None else f"{text} ({gap:+.1f})"
