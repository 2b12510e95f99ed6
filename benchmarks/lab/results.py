"""A benchmark's figures as a JSON file, and files that a run which was stopped goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.lab.machine import machine
from deepclean_hooks.report.report import versions
from deepclean_hooks.stored.files import written_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
T = TypeVar("T")


def origin() -> dict[str, Any]:
    """The machine and the versions, which every file of figures begins with."""
    return {"machine": machine(), "versions": versions()}


def write(path: Path, **figures: Any) -> None:
    """Writes the figures with the machine and the versions that they are of."""
    store(path, {**origin(), **figures})


def store(path: Path, content: Any) -> None:
    """Writes the JSON file whole or not at all, so that a benchmark that goes on can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def kept(path: Path, make: Callable[[], T]) -> T:
    """What the file holds; made and written first where there is none."""
    if not path.exists():
        store(path, make())
    content: T = read(path)
    return content
