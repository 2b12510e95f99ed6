"""Tables in Markdown, and their places in a page."""

from __future__ import annotations

import re
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The rows under their head."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def placed(page: str, name: str, text: str) -> str:
    """The page with the text between `<!-- table: name -->` and `<!-- end -->`; the prose around it
    stays. Raises ValueError for a page without these marks."""
    block = f"<!-- table: {name} -->\n{text}\n<!-- end -->"
    pattern = rf"<!-- table: {re.escape(name)} -->.*?<!-- end -->"
    page, count = re.subn(pattern, lambda _: block, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} places for the table {name!r}; it needs one")
    return page
