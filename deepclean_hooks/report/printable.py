"""Text of a file for a terminal or a page: it shows what it is and does nothing else."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text in one line, control and invisible characters escaped: none moves the cursor, begins
    a line or turns the reading order."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def shortened(text: str, most: int) -> str:
    """The beginning of a text that is too long to show."""
    return text if len(text) <= most else f"{text[:most]}..."
