"""What a run leaves beside its weights: report files in a folder, figures, two lines to read."""

from __future__ import annotations

import logging
from pathlib import Path

from deepclean_hooks import ranks
from deepclean_hooks.report.report import Report
from deepclean_hooks.stored.files import write_text

TEXT = "report.txt"
_log = logging.getLogger(__name__)


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json and report.txt, each whole or not at all, on rank 0; makes the folder.

    All ranks call this: an error in writing is raised on each of them.
    """
    with ranks.fail_together():
        _write(report, folder)


def require_folder(folder: Path) -> None:
    """Makes the folder on rank 0; raises OSError, on every rank, if that cannot be done."""
    with ranks.fail_together():
        if ranks.is_first():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as reason:
                raise OSError(
                    f"the folder {folder} for the reports cannot be made: {reason}; pass another "
                    "as folder="
                ) from reason


def leave_report(report: Report, folder: Path) -> None:
    """Writes the same after an error, which the ranks need not share; where that fails, says so."""
    try:
        _write(report, folder)
    except OSError as reason:
        _log.warning("the report was not written to %s: %s", folder, reason)


def _write(report: Report, folder: Path) -> None:
    if ranks.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.json", report.to_json() + "\n")
        write_text(folder / TEXT, f"{report}\n")


def selection_figures(report: Report) -> dict[str, float]:
    """The numbers of the selection by the names they are logged under; those that are None left
    out."""
    found = {
        "deepclean_selected_fraction": report.selected_fraction,
        "deepclean_dead_fraction": report.dead_fraction,
        "deepclean_forget_accuracy_before": _forget_accuracy(report, "before"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def line_before(report: Report, folder: Path) -> str:
    """What was selected, in one line for the terminal."""
    accuracy = _forget_accuracy(report, "before")
    parts = [
        f"deepclean: {report.selected_entries} of {report.trainable_entries} trainable entries "
        f"({report.selected_fraction or 0:.2%}) selected by {report.method}",
        None if report.dead_fraction is None else f"{report.dead_fraction:.2%} of them dead",
        None if accuracy is None else f"forget accuracy {accuracy:.2f} %",
        f"report in {folder / TEXT}",
    ]
    return ", ".join(part for part in parts if part)


def line_after(report: Report, folder: Path) -> str:
    """What was held and what the model still knows, in one line for the terminal."""
    accuracy = _forget_accuracy(report, "after")
    parts = [
        f"deepclean: {report.frozen_entries_moved} frozen entries moved in "
        f"{report.optimizer_steps} optimizer steps",
        None if accuracy is None else f"forget accuracy {accuracy:.2f} %",
        f"report in {folder / TEXT}",
    ]
    return ", ".join(part for part in parts if part)


def _forget_accuracy(report: Report, when: str) -> float | None:
    scores = report.scores.get(when)
    if not isinstance(scores, dict) or "forget" not in scores["sets"]:
        return None
    return float(scores["sets"]["forget"]["accuracy"])
