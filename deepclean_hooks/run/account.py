"""The account that a run keeps while it goes on: its report, the clock, and its warnings."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from deepclean_hooks import ranks
from deepclean_hooks.report.report import Report


class Account:
    """Holds the report as it is so far; whoever learns something replaces fields of it."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def note(self, text: str) -> None:
        """Adds a warning to the report alone; nothing for an empty text."""
        if text:
            self.report = replace(self.report, warnings=(*self.report.warnings, text))

    def warn(self, text: str) -> None:
        """Adds a warning to the report and warns of it, on rank 0; nothing for an empty text."""
        self.note(text)
        if text and ranks.is_first():
            warnings.warn(text, UserWarning, stacklevel=3)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's wall-clock time to the seconds of a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = self.report.seconds.get(phase, 0.0) + time.perf_counter() - start
            self.report = replace(self.report, seconds={**self.report.seconds, phase: spent})
