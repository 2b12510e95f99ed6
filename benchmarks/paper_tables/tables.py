"""The collected figures as tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .methods import ABLATIONS, ASKED, AT, BUDGETED, GUIDED, MAIN, MORE
from .setups import FIFTY

Summary = dict[str, Any]
TITLES = {
    "random": "10 % of the training samples at random",
    "percent": "1 % of the training samples at random",
    **{name: f"50 training samples, draw {name[-1]}" for name in FIFTY},
    "class": "one class (label 0)",
}
OVER_CLASSES = {
    "acc_dr": "Acc D_r",
    "acc_df": "Acc D_f",
    "acc_test": "Acc test, other classes",
    "acc_df_test": "Acc test, the class",
}
COLUMNS = {
    "acc_dr": ("Acc D_r", ".1f"),
    "acc_df": ("Acc D_f", ".1f"),
    "acc_test": ("Acc test", ".1f"),
    "delta_acc_df": ("Δ Acc D_f", "+.1f"),
    "mia": ("MIA", ".1f"),
    "delta_mia": ("Δ MIA", "+.1f"),
    "mia_attacker_accuracy": ("attacker right", ".1f"),
    "average_gap": ("average gap", ".2f"),
    "seconds": ("s", ".1f"),
    "time_ratio": ("time / gold", ".3f"),
    "selected_fraction": ("selected %", ".1f"),
    "dead_fraction": ("dead %", ".1f"),
}
PER_CENT = ("selected_fraction", "dead_fraction")  # 0 to 1 in the file
BOLD = "deepclean"


def tables(told: dict[str, Any]) -> str:
    """Every scenario of one file: the tables, the ablations, and what golds differ by; classes that
    were forgotten in turn in one table."""
    parts = []
    if "over_classes" in told:
        parts.append(f"### Forgetting each class in turn\n\n{over_classes(told['over_classes'])}")
    for scenario in sorted(told["summary"], key=[*TITLES, *told["summary"]].index):
        found = told["summary"][scenario]
        title = TITLES.get(scenario) or scenario.replace("-", " ")
        golds = [_gold_line(told, scenario)] if "gold" in found else []
        parts.append("\n\n".join([f"### Forgetting {title}", *golds]))
        parts.append(table(found, ["gold", "original", *MAIN, *MORE, *GUIDED, *ASKED]))
        changed = [name for name in found if name in ABLATIONS or AT in name]
        if changed:
            parts.append("DeepClean with one thing changed, and other budgets (`@` epochs):")
            budgeted = [n for n in found if AT in n and n.partition(AT)[0] in BUDGETED]
            parts.append(table(found, ["gold", "deepclean", *ABLATIONS, *budgeted]))
    return "\n\n".join(parts)


def table(found: dict[str, Summary], methods: Sequence[str]) -> str:
    """Those of the methods that have figures: mean, and ± standard deviation over the seeds."""
    shown = [name for name in methods if name in found]
    columns = {k: v for k, v in COLUMNS.items() if any(k in found[name] for name in shown)}
    lines = ["| method | seeds | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("| --- | --: |" + " --: |" * len(columns))
    for name in shown:
        bold = f"**{name}**" if name == BOLD else name
        cells = [_cell(found[name].get(k), k, form) for k, (_, form) in columns.items()]
        lines.append(f"| {bold} | {found[name]['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_classes(found: dict[str, Summary]) -> str:
    """Mean ± standard deviation over the classes, and the worst class."""
    titles = [cell for title in OVER_CLASSES.values() for cell in (title, "worst")]
    lines = ["| method | classes | " + " | ".join(titles) + " | s |"]
    lines.append("| --- | --: |" + " --: |" * (len(titles) + 1))
    for name, figures in found.items():
        bold = f"**{name}**" if name == BOLD else name
        cells = []
        for key in OVER_CLASSES:
            figure = figures[key]
            cells += [_cell(figure, key, ".1f"), f"{figure['worst']:.1f}"]
        seconds = _cell(figures.get("seconds"), "seconds", ".0f")
        lines.append(f"| {bold} | {figures['cells']} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def placed(page: str, stem: str, text: str) -> str:
    """The page with the text between its two marks for that file; the prose around it stays.

    Raises ValueError for a page without these marks.
    """
    start, end = f"<!-- {stem} -->", f"<!-- end of {stem} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no place for the tables: put {start} and {end} into it")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def _cell(figure: dict[str, float | None] | None, name: str, form: str) -> str:
    if figure is None:
        return "-"
    factor = 100 if name in PER_CENT else 1
    mean, spread = figure["mean"], figure["std"]
    assert mean is not None
    text = format(factor * mean, form)
    return text if spread is None else f"{text} ± {factor * spread:{form.lstrip('+')}}"


def _gold_line(told: dict[str, Any], scenario: str) -> str:
    spread = told["gold_to_gold"].get(scenario)
    if spread is None:
        return "One seed: how far golds differ among themselves is not known."
    return (
        "Golds of two seeds differ by up to "
        f"{spread['acc_dr']:.1f} (D_r), {spread['acc_df']:.1f} (D_f), {spread['acc_test']:.1f} "
        f"(test) and {spread['mia']:.1f} (MIA) percentage points."
    )
