"""A benchmark's figures as a JSON file, with the machine and the versions they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepclean_hooks.report.report import versions
from deepclean_hooks.stored.files import written_whole
from machine import machine


def write(path: Path, **figures: Any) -> None:
    """Writes the file whole or not at all, so that a benchmark that goes on can read it."""
    told = {"machine": machine(), "versions": versions(), **figures}
    with written_whole(path) as temporary:
        Path(temporary).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
