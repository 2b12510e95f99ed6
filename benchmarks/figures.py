"""The paper's Figures 3 and 4 of our own run, as SVG: what each gamma selects, and how the network
then behaves.

    python -m benchmarks.gamma_auto --data-dir DATA --checkpoint resnet20.th   # measures
    python -m benchmarks.figures                                                # draws

Reads benchmarks/results/gamma_auto_cifar10.json and writes docs/figures: `gamma_selected_*.svg` and
`gamma_accuracy_*.svg`, each with the numbers it shows as JSON beside it. Figures are means over the
seeds of the file.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.lab.results import RESULTS, ROOT, read, store
from deepclean_hooks.report import curves

MEASURED = RESULTS / "gamma_auto_cifar10.json"
FIGURES = ROOT / "docs" / "figures"
SETS = ("forget", "retain", "test")


def mean_of(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The sweep whose figures are the means of several, as `GammaSweep.to_dict` has it."""
    points = []
    for rows in zip(*(cell["fixed"] for cell in cells), strict=True):
        selected = {
            name: statistics.fmean(row["selected"][name] for row in rows)
            for name in cells[0]["entries"]
        }
        points.append(
            {
                "gamma": rows[0]["gamma"],
                "selected": selected,
                "selected_entries": sum(selected.values()),
                "zeroed": accuracies([row["zeroed"] for row in rows]),
                "tuned": accuracies(list(rows)),
            }
        )
    return {
        "points": points,
        "entries": cells[0]["entries"],
        "original": accuracies([cell["original"] for cell in cells]),
        "seeds": [cell["seed"] for cell in cells],
    }


def accuracies(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {f"{name}.accuracy": statistics.fmean(row[name] for row in rows) for name in SETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--output", type=Path, default=FIGURES)
    given = parser.parse_args()
    told = read(given.measured)
    given.output.mkdir(parents=True, exist_ok=True)
    for scenario in dict.fromkeys(cell["scenario"] for cell in told["cells"]):
        sweep = mean_of([cell for cell in told["cells"] if cell["scenario"] == scenario])
        drawings = {"selected": curves.selection(sweep), "accuracy": curves.behaviour(sweep)}
        for what, drawing in drawings.items():
            if drawing is not None:
                curves.write(drawing, given.output / f"gamma_{what}_{scenario}.svg")
        sweep |= {"setting": told["setting"], "versions": told["versions"]}
        store(given.output / f"gamma_{scenario}.json", sweep)


if __name__ == "__main__":
    main()
