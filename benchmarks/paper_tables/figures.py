"""The frontier: the average gap to gold against the cost, a point for each method and budget."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .methods import ABLATIONS, AT, CONTENDERS

STYLES = list(CONTENDERS)
LEFT_OUT = {"gold", "original", *ABLATIONS} - {"all-free"}


def frontier(told: dict[str, Any], path: Path) -> None:
    """Draws both scenarios beside each other, into a file of any format that matplotlib writes."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise ImportError("the frontier is drawn by matplotlib: pip install matplotlib") from reason
    # The same file for the same figures: no time of day, no random names.
    with rc_context({"svg.hashsalt": "frontier"}):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        scenarios = [s for s in ("random", "class") if s in told["summary"]]
        axes = figure.subplots(1, len(scenarios), squeeze=False)[0]
        for axis, scenario in zip(axes, scenarios, strict=True):
            _draw(axis, told["summary"][scenario], scenario)
        axes[0].set_ylabel("average gap to gold, percentage points")
        handles, labels = axes[0].get_legend_handles_labels()
        for axis in axes[1:]:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                if label not in labels:
                    handles.append(handle)
                    labels.append(label)
        figure.legend(handles, labels, fontsize=7, loc="outside right upper")
        kept = {"Date": None} if path.suffix == ".svg" else None
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(os.fspath(path), metadata=kept)


def _draw(axis: Any, found: dict[str, Any], scenario: str) -> None:
    from matplotlib.ticker import LogLocator

    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name, figures in found.items():
        known, _, budget = name.partition(AT)
        if known not in LEFT_OUT and "average_gap" in figures:
            point = (figures["time_ratio"]["mean"], figures["average_gap"]["mean"], budget)
            lines.setdefault(known, []).append(point)
    for name, points in lines.items():
        at = STYLES.index(name)  # the same in both scenarios
        points.sort()
        x, y = [p[0] for p in points], [p[1] for p in points]
        wide = {"linewidth": 2.4, "zorder": 3} if name == "deepclean" else {"linewidth": 1}
        marker = "osD^"[at // 10]
        axis.plot(x, y, marker=marker, label=name, color=f"C{at % 10}", **wide)
    if "gold" in found:
        axis.axvline(1.0, color="grey", linestyle=":", linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.set_major_formatter("{x:g}")
        one.set_minor_formatter("")
    axis.set_xlabel("time / time of retraining")
    axis.set_title("random 10 %" if scenario == "random" else "one class")
    axis.grid(alpha=0.3, which="both")
