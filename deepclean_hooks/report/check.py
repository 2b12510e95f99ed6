"""A check of `verify` and its outcome."""

from __future__ import annotations

from dataclasses import dataclass

from deepclean_hooks.report.printable import printable, shortened

_SHOWN = 3
_LONGEST_NAME, _LONGEST_LINE = 160, 700


@dataclass(frozen=True)
class Check:
    """A check: `right` is None where it could not be made."""

    what: str
    right: bool | None
    seen: str

    def __str__(self) -> str:
        """A line with the outcome first, printable whatever the names in a file hold."""
        word = {True: "ok      ", False: "MISMATCH", None: "skipped "}[self.right]
        what, seen = (shortened(printable(text), _LONGEST_LINE) for text in (self.what, self.seen))
        return f"{word} {what}: {seen}"


def equal(what: str, computed: object, reported: object) -> Check:
    """That a figure is what the report says it is."""
    if reported is None:
        return Check(what, None, "the report has no such figure")
    right = computed == reported
    return Check(what, right, str(computed) if right else f"{computed}, the report says {reported}")


def none_of(what: str, wrong: list[str], right: str) -> Check:
    """That nothing is wrong; what was seen names it, or is `right`."""
    return Check(what, not wrong, listed(wrong) if wrong else right)


def listed(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    shown = [shortened(name, _LONGEST_NAME) for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
