"""A report as one HTML page for someone who is no engineer: no script, no network, plots as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from deepclean_hooks.report import curves, svg
from deepclean_hooks.report import rows as report_rows
from deepclean_hooks.report.stored_report import Document
from deepclean_hooks.report.svg import Axis, Line

BEFORE, AFTER, GOLD, UNSEEN = "#c4572b", "#1d5fa8", "#2b8a3e", "#77808b"
MOST_BARS = 40
_KEYS = ("forget.accuracy", "retain.accuracy")
# Of the trials of gamma="auto": (what the model showed, heading, unit)
_BEHAVIOUR = (
    ("new_class_accuracy", "Right, classes not kept", "%"),
    ("forget_accuracy", "Right, other forgotten data", "%"),
    ("held_out_accuracy", "Right, held-out data", "%"),
    ("forget_loss", "Loss, forgotten", ""),
    ("held_out_loss", "Loss, held-out", ""),
    ("retain_accuracy", "Right, data kept", "%"),
)


@dataclass(frozen=True)
class Drawing:
    """A chart with what it shows."""

    title: str
    chart: Markup
    caption: str


def page(
    report: Document,
    sweep: Document | None = None,
    compared: Mapping[str, Document] | None = None,
) -> str:
    """The page; `sweep` is `GammaSweep.to_dict()`, for the gamma curves, `compared` the
    `Evaluation.to_dict()` of several methods by name, for a table of them."""
    tables = report_rows.compared(compared or {})
    return svg.TEMPLATES.get_template("page.html").render(
        report=report,
        keys=_keys(report),
        asked=report_rows.asked(report),
        done=report_rows.done(report),
        rows=report_rows.rows(report),
        golds=report_rows.golds(report),
        average=report_rows.score(report, "after").get("average_gap", {}),
        drawings=_drawings(report),
        compared=tables,
        gold=[_gold(rows) for rows in zip(*tables.values(), strict=True)],
        attacks=report_rows.attacks(report),
        caveats=report_rows.caveats(report),
        layers=_layers(report),
        trials=_trials(report["gamma_choice"]),
        gamma=_gamma(sweep),
        origin=[*report_rows.digests(report), *report["versions"].items()],
        commands=(report_rows.VERIFY, report_rows.VERIFY_BOTH),
    )


def _keys(report: Document) -> list[tuple[str, str]]:
    keys: list[tuple[str, str]] = []
    if report["forget_samples"] is not None:
        keys.append((f"{report['forget_samples']:,}", "samples to forget"))
    if report["selected_fraction"]:
        share = f"{100 * report['selected_fraction']:.1f} %"
        keys.append((share, f"of the weights {report['effect']}"))
    held = report_rows.frozen(report)
    if report["frozen_entries_moved"] is not None and held:
        keys.append((f"{report['frozen_entries_moved']:,}", f"of {held:,} other weights changed"))
    for row in report_rows.rows(report):
        if row.name in _KEYS:
            label, was, now, gold, _ = row.cells()
            beside = f"was {was}" + (f", retrained {gold}" if row.gold is not None else "")
            keys.append((now, f"{label[0].lower()}{label[1:]} ({beside})"))
    return keys


def _gold(rows: Sequence[report_rows.Row]) -> tuple[str, str]:
    """The label of a row of several methods, and the gold model's figure."""
    return rows[0].label, next((row.cells()[3] for row in rows if row.gold is not None), "-")


def _trials(choice: Document) -> dict[str, Any]:
    """The trials that gamma was chosen from: headings and rows."""
    if not choice:
        return {}
    shown = [each for each in _BEHAVIOUR if choice["original"].get(each[0]) is not None]
    heads = ["gamma", "Weights reset", *(label for _, label, _ in shown), "Distance"]
    body = []
    for trial in choice["trials"]:
        cells = [f"{trial['gamma']:g}", f"{trial['selected_entries']:,}"]
        for name, _, unit in shown:
            value = trial["behaviour"].get(name)
            cells.append("-" if value is None else f"{value:.1f} %" if unit else f"{value:.3f}")
        cells += [f"{trial['distance']:.1f}", "yes" if trial["as_unseen"] else "no"]
        body.append((trial["gamma"] == choice["gamma"], cells))
    return {"reason": choice["reason"], "heads": [*heads, "Met as unseen"], "rows": body}


def _drawings(report: Document) -> list[Drawing]:
    before, after = (report_rows.score(report, when) for when in ("before", "after"))
    gold = after.get("gold") or {}
    unseen = "forget_test" if "forget_test" in after.get("histograms", {}) else "test"
    words = "similar new data" if unseen == "forget_test" else "new data"
    series = [
        ("forgotten, original model", BEFORE, False, before, "forget"),
        ("forgotten, unlearned model", AFTER, False, after, "forget"),
        ("forgotten, retrained model", GOLD, False, gold, "forget"),
        (f"{words}, unlearned", UNSEEN, True, after, unseen),
    ]
    drawn = []
    if after:
        aim = "green line (retrained)" if gold else "grey line (new data)"
        drawn = [_confidence(series, aim), _loss(series, aim), _roc(before, after, gold)]
    return [drawing for drawing in drawn if drawing is not None]


Series = Sequence[tuple[str, str, bool, Document, str]]


def _outlines(series: Series, kind: str, scale: float = 1) -> list[Line]:
    """The histograms as lines: per cent of the samples in each bin."""
    lines = []
    for name, colour, dashed, score, of_set in series:
        counts = score.get("histograms", {}).get(of_set, {}).get(kind, [])
        edges = [scale * edge for edge in score.get("edges", {}).get(kind, [])]
        if counts and len(edges) == len(counts) + 1 and sum(counts):
            shares = [100 * count / sum(counts) for count in counts]
            lines.append(Line(name, colour, svg.steps(shares, edges), dashed))
    return lines


def _shares(lines: Sequence[Line]) -> Axis:
    top = max(y for line in lines for _, y in line.points)
    step = next((s for s in (0.5, 1, 2, 5, 10, 20) if top / s <= 6), 25)
    ticks = [(i * step, f"{i * step:g} %") for i in range(int(top / step) + 1)]
    return Axis("share of the samples", 0, top * 1.05 or 1, ticks)


def _confidence(series: Series, aim: str) -> Drawing | None:
    lines = _outlines(series, "confidence", scale=100)
    if not lines:
        return None
    title = "How sure the model is"
    x = svg.percent("probability given to the right answer")
    caption = (
        "Left: the model does not know the answer. Right: it is certain. The blue line "
        f"(unlearned) should lie on the {aim}, not on the orange one (original)."
    )
    return Drawing(title, svg.chart(lines, x, _shares(lines), title=title), caption)


def _loss(series: Series, aim: str) -> Drawing | None:
    lines = _outlines(series, "loss")
    if not lines:
        return None
    title = "How surprised the model is"
    low, high = lines[0].points[0][0], lines[0].points[-1][0]
    marks = [(1e-6, "0.000001"), (1e-4, "0.0001"), (1e-2, "0.01"), (1.0, "1"), (100.0, "100")]
    x = Axis("loss (logarithmic)", low, high, [m for m in marks if low <= m[0] <= high], log=True)
    caption = (
        "Left: what the model knows by heart. Right: what it would not have said. Again the "
        f"blue line should lie on the {aim}."
    )
    return Drawing(title, svg.chart(lines, x, _shares(lines), title=title), caption)


def _roc(before: Document, after: Document, gold: Document) -> Drawing | None:
    lines = [Line("guessing", "#b9c0c7", [(0, 0), (100, 100)], dashed=True)]
    for name, colour, score in (
        ("original", BEFORE, before),
        ("unlearned", AFTER, after),
        ("retrained", GOLD, gold),
    ):
        roc = score.get("attacks", {}).get("threshold_loss", {}).get("roc", [])
        if roc:
            lines.append(Line(name, colour, [(100 * false, 100 * true) for false, true in roc]))
    if len(lines) == 1:
        return None
    return Drawing(
        "Can the forgotten data be recognised?",
        svg.chart(
            lines,
            svg.percent("new data wrongly called training data"),
            svg.percent("forgotten data recognised"),
            title="ROC of the attack on the loss",
        ),
        "Each point is an attacker with another threshold on the loss. On the diagonal he might as "
        "well guess, which is the aim; far above it he recognises the forgotten data, far below it "
        "they look stranger than new data.",
    )


def _layers(report: Document) -> Drawing | None:
    chosen = [
        (layer["name"], layer["selected"] / layer["entries"])
        for layer in report["layers"]
        if layer["selected"] and layer["entries"]
    ]
    if not chosen:
        return None
    largest = set(sorted(chosen, key=lambda layer: -layer[1])[:MOST_BARS])
    shown = [layer for layer in chosen if layer in largest]
    note = f"All {len(chosen)} parameters with selected weights, in the order of the model."
    if len(shown) < len(chosen):
        note = f"The {MOST_BARS} parameters with the largest share, of {len(chosen)}."
    rows = [(name, share, f"{share:.1%}") for name, share in shown]
    chart = svg.bars(rows, title="share of each parameter that was selected", colour=AFTER)
    return Drawing("Share of each layer that was selected", chart, note)


def _gamma(sweep: Document | None) -> list[Drawing]:
    if not sweep or not sweep["points"]:
        return []
    words = "The larger gamma, the fewer weights are reset."
    drawn = [Drawing("Weights reset", curves.selection(sweep), words)]
    accuracy = curves.behaviour(sweep)
    if accuracy is not None:
        words = "Dashed: right after the reset. Full: after the training that follows it."
        drawn.append(Drawing("Accuracy", accuracy, words))
    return drawn
