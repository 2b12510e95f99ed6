"""Gamma curves drawn by matplotlib (the extra `plots`) into a file of any format it writes."""

from __future__ import annotations

import os
from typing import Any

SETS = {"retain": "C0", "forget": "C3", "test": "C2", "forget_test": "C1"}
MOST_LAYERS = 12


def selection(sweep: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """The selected share of each parameter, in per cent, against gamma; all together in black."""
    figure, axes = _axes("selected entries, %")
    gammas = [point["gamma"] for point in sweep["points"]]
    names = list(sweep["entries"])
    step = -(-len(names) // MOST_LAYERS)  # of many layers every step-th, named in the legend
    for name in names[::step]:
        share = [100 * p["selected"].get(name, 0) / sweep["entries"][name] for p in sweep["points"]]
        axes.plot(gammas, share, marker=".", linewidth=1, label=name)
    total = sum(sweep["entries"].values())
    whole = [100 * point["selected_entries"] / total for point in sweep["points"]]
    axes.plot(gammas, whole, color="black", marker="o", linewidth=2, label="all that may be")
    _save(figure, axes, path)


def behaviour(sweep: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """The accuracy on each set against gamma: dashed with W_f at 0, full after the fine-tune."""
    points = sweep["points"]
    if not any(point["zeroed"] or point["tuned"] for point in points):
        raise ValueError("the sweep has no figures to draw; run gamma_sweep with scores=True")
    figure, axes = _axes("accuracy, %")
    gammas = [point["gamma"] for point in points]
    for kind, style in (("zeroed", "--"), ("tuned", "-")):
        for name, colour in SETS.items():
            values = [point[kind].get(f"{name}.accuracy") for point in points]
            if all(value is not None for value in values):
                label = f"{name}, {'W_f at 0' if kind == 'zeroed' else 'fine-tuned'}"
                axes.plot(gammas, values, style, color=colour, linewidth=1.8, label=label)
    _save(figure, axes, path)


def _axes(label: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise ImportError('plots need matplotlib: pip install "deepclean-hooks[plots]"') from reason
    # Not pyplot, which keeps every figure and may open a window.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_xlabel("gamma")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: str | os.PathLike[str]) -> None:
    ticks = sorted({float(x) for line in axes.lines for x in line.get_xdata()})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45)
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=7, handlelength=3.2, loc="center left", bbox_to_anchor=(1.01, 0.5))
    import matplotlib

    # The same numbers give the same file, with letters that can be searched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deepclean-hooks"}):
        undated = {"Date": None} if str(path).endswith(".svg") else None
        figure.savefig(path, dpi=150, metadata=undated)
