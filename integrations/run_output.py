"""What the training callbacks leave of a run: its report in a folder, its figures for loggers."""

from __future__ import annotations

from pathlib import Path

from deepclean_hooks import ranks
from deepclean_hooks.report.report import Report


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json and report.txt, on rank 0 only; makes the folder."""
    if ranks.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
        (folder / "report.txt").write_text(f"{report}\n", encoding="utf-8")


def selection_figures(report: Report) -> dict[str, float]:
    """The numbers of the selection by the names they are logged under; those that are None left
    out."""
    found = {
        "deepclean_selected_fraction": report.selected_fraction,
        "deepclean_dead_fraction": report.dead_fraction,
    }
    return {name: float(value) for name, value in found.items() if value is not None}
