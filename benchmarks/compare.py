"""Whether a ratio became worse between two result files of one benchmark: exit code 1 if so.

    python -m benchmarks.compare OLD.json NEW.json [--limit 0.05]

Every ratio to a plain pass (smaller is better) is compared with that of the same row, a row being
known by its model and settings. Rows that only one file has are named and do not count; two files
without a common row are an error (exit code 2).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lab.results import read

# What is divided by a plain pass, by retraining, or by the first request.
RATIOS = (
    "ratio",
    "ratio_first",
    "ratio_beside_the_result",
    "ratio_of_retraining",
    "share_of_one_process",
    "of_first",
    "time_ratio",
)
# What tells the rows of one file apart.
SETTINGS = (
    "model",
    "request",
    "scenario",
    "method",
    "seed",
    "image",
    "batch",
    "samples",
    "stored",
    "scores",
    "entries",
    "threads",
    "processes",
    "optimizer",
    "compact",
    "free_fraction",
    "accumulate",
)


def ratios(told: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """(the row and the ratio's name, its value) for every ratio of a result file."""
    if isinstance(told, list):
        for row in told:
            yield from ratios(row, place)
    elif isinstance(told, dict):
        settings = tuple(f"{name} {told[name]}" for name in SETTINGS if name in told)
        for name, value in told.items():
            if name in RATIOS and isinstance(value, int | float):
                yield ", ".join((*place, *settings, name)), float(value)
            else:
                inside = () if name in ("rows", "later") else (name,)
                yield from ratios(value, (*place, *settings, *inside))


def compared(old: Any, new: Any, limit: float) -> tuple[list[str], list[str], int]:
    """(a line for each ratio that rose by more than the limit, for each row that one file lacks,
    how many ratios both files have)."""
    before, after = dict(ratios(old)), dict(ratios(new))
    common = [name for name in before if name in after]
    worse = [
        f"{name}: {before[name]:.3f} -> {after[name]:.3f} ({after[name] / before[name] - 1:+.1%})"
        for name in common
        if after[name] > before[name] * (1 + limit)
    ]
    missing = [f"only in the old file: {name}" for name in before if name not in after]
    missing += [f"only in the new file: {name}" for name in after if name not in before]
    return worse, missing, len(common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--limit", type=float, default=0.05, help="of a rise (default: 0.05)")
    options = parser.parse_args()
    worse, missing, common = compared(read(options.old), read(options.new), options.limit)
    print(*missing, sep="\n", end="\n" if missing else "")
    if not common:
        print(f"{options.old} and {options.new} have no ratio in common", file=sys.stderr)
        raise SystemExit(2)
    print(*worse, sep="\n", end="\n" if worse else "")
    print(f"{len(worse)} of {common} ratios rose by more than {options.limit:.1%}")
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()
