"""A report as one HTML page for someone who is no engineer: no script, no network, plots as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from deepclean_hooks.report import rows as report_rows
from deepclean_hooks.report import svg
from deepclean_hooks.report.rows import Told
from deepclean_hooks.report.svg import Axis, Line

BEFORE, AFTER, GOLD, UNSEEN = "#c4572b", "#1d5fa8", "#2b8a3e", "#77808b"
MOST_BARS = 40
# The edges of deepclean_hooks.metrics.histogram, which a stored report does not carry.
_CONFIDENCE = [100 * i / 20 for i in range(21)]
_LOSS = [10 ** (i / 2) for i in range(-12, 5)]

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: #1f2730; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; background: #fff; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #dde2e7; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p, ul { margin: .4rem 0; }
ul { padding-left: 1.2rem; }
.lead { color: #55606c; margin-top: 0; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem;
  margin: 1rem 0; }
.key div { background: #f0f4f8; border-radius: .5rem; padding: .6rem .8rem; font-size: .85rem;
  color: #55606c; }
.key b { display: block; font-size: 1.35rem; color: #1f2730; line-height: 1.3; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .45rem .6rem; border-bottom: 1px solid #e3e6ea;
  vertical-align: top; }
th { font-weight: 600; background: #f7f9fb; }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th.h { text-align: right; vertical-align: bottom; font-size: .82rem; }
td small { display: block; color: #66717d; }
.good { color: #1e6b30; } .bad { color: #a8321c; } .none { color: #66717d; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 1.4rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; max-width: 34rem; display: block; }
figcaption { font-size: .87rem; color: #55606c; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85em; }
pre { background: #f0f4f8; padding: .7rem; border-radius: .4rem; white-space: pre-wrap; }
code { overflow-wrap: anywhere; }
details { margin: .4rem 0; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  main { padding: 1rem .9rem 2rem; }
  table.figures, table.figures tbody, table.figures tr, table.figures td { display: block; }
  table.figures thead { display: none; }
  table.figures tr { border-bottom: 1px solid #dde2e7; padding: .5rem 0; }
  table.figures td { border: 0; padding: .1rem 0; text-align: left; }
  table.figures td[data-label] { display: inline-block; margin-right: .9rem; }
  table.figures td[data-label]::before { content: attr(data-label) ": "; color: #66717d; }
}
@media print { body { background: #fff; } main { max-width: none; } }
"""


def page(
    report: Told, sweep: Told | None = None, compared: Mapping[str, Told] | None = None
) -> str:
    """The page; `sweep` is `GammaSweep.to_dict()`, for the gamma curves, `compared` the
    `Evaluation.to_dict()` of several methods by name, for a table of them."""
    after = report["scores"].get("after")
    before = report["scores"].get("before")
    blocks = [
        _head(report),
        _section("What was asked", _items(report_rows.asked(report))),
        _section("What was done", _items(report_rows.done(report))),
        _section("Did it work?", _table(report)),
        _section("The same in pictures", _plots(before, after)),
        _section("The same request by other methods", _compared(compared or {})),
        _section("How the attackers worked", _attacks(report)),
        _section("What these figures do not show", _items(report_rows.caveats(report))),
        _section("Which weights were selected", _layers(report)),
        _section("How strict to be: gamma", _choice(report.get("gamma_choice")) + _gamma(sweep)),
        _section("Where this comes from, and how to verify it", _origin(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Unlearning report: {escape(report['method'])}</title><style>{STYLE}</style>"
        f"</head><body><main>{''.join(blocks)}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def _items(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _head(report: Told) -> str:
    finished = report["phase"] == "finished"
    lead = (
        "A trained classifier was made to forget some of its training data. This page says what "
        "was asked, what was done, and how far the result is from a model that never saw them."
    )
    keys: list[tuple[str, str]] = []
    if report["forget_samples"] is not None:
        keys.append((f"{report['forget_samples']:,}", "samples to forget"))
    if report["selected_fraction"]:
        share = f"{100 * report['selected_fraction']:.1f} %"
        keys.append((share, f"of the weights {report_rows.effect(report)}"))
    if report["frozen_entries_moved"] is not None and report_rows.frozen(report):
        of = f"of {report_rows.frozen(report):,} other weights changed"
        keys.append((f"{report['frozen_entries_moved']:,}", of))
    for row in report_rows.rows(report):
        if row.label in ("Accuracy, forgotten data", "Accuracy, data kept"):
            _, was, now, gold, _ = row.cells()
            beside = f"was {was}" + (f", retrained {gold}" if row.gold is not None else "")
            keys.append((now, f"{row.label[0].lower()}{row.label[1:]} ({beside})"))
    boxes = "".join(f"<div><b>{escape(a)}</b>{escape(b)}</div>" for a, b in keys)
    state = "" if finished else '<p class="bad">This run is not finished.</p>'
    return (
        f'<h1>Unlearning report</h1><p class="lead">{lead}</p>{state}<div class="key">{boxes}</div>'
    )


def _table(report: Told) -> str:
    found = report_rows.rows(report)
    if not found:
        return "<p>The model was not scored.</p>"
    count = report_rows.golds(report)
    words = {0: "retrained", 1: "retrained"}.get(count, f"retrained (mean of {count})")
    heads = ("", "original", "unlearned", words, "gap", "verdict")
    classes = ("", "n", "n", "n", "n", "")
    head = "".join(f'<th class="{c}">{escape(h)}</th>' for h, c in zip(heads, classes, strict=True))
    body = []
    for row in found:
        label, *figures = row.cells()
        cells = "".join(
            f'<td class="n" data-label="{escape(name)}">{escape(text)}</td>'
            for name, text in zip(heads[1:5], figures, strict=True)
        )
        body.append(
            f"<tr><td><b>{escape(label)}</b><small>{escape(row.meaning)}</small></td>{cells}"
            f'<td class="{_tone(row.verdict)}">{escape(row.verdict)}</td></tr>'
        )
    told = (
        '<p>"Retrained" is a model trained from scratch without the forgotten data: the aim of '
        'unlearning. "Gap" is unlearned minus retrained, and the aim is 0; "spread" is the largest '
        "difference between two retrained models.</p>"
    )
    return (
        f'{told}<div class="wide"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{_average(report)}"
    )


def _compared(evaluations: Mapping[str, Told]) -> str:
    tables = report_rows.compared(evaluations)
    heads = [row.label for row in next(iter(tables.values()), [])]
    if not heads:
        return ""
    gold = {
        row.label: row.cells()[3] for own in tables.values() for row in own if row.gold is not None
    }
    first = "".join(
        f'<td class="n" data-label="{escape(label)}">{escape(gold.get(label, "-"))}</td>'
        for label in heads
    )
    body = [
        f"<td><b>{escape(name)}</b></td>"
        + "".join(
            f'<td class="n {_tone(row.verdict)}" data-label="{escape(row.label)}">'
            f"{escape(row.cells()[2])}<small>{escape(row.cells()[4])}</small></td>"
            for row in own
        )
        for name, own in tables.items()
    ]
    head = "".join(f'<th class="h">{escape(text)}</th>' for text in ("", *heads))
    lines = "".join(f"<tr>{one}</tr>" for one in [f"<td><b>retrained</b></td>{first}", *body])
    return (
        "<p>Below each figure is its gap to the retrained models, green where it is within what "
        "these differ by, red where not.</p>"
        f'<div class="wide"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _tone(verdict: str) -> str:
    """The colour of a verdict, a class of the style sheet."""
    words = verdict.split(" ", 1)[0]
    return {"within": "good", "beyond": "bad"}.get(words, "none")


def _choice(choice: Told | None) -> str:
    """The trials that gamma was chosen from."""
    if not choice:
        return ""
    names = [
        ("new_class_accuracy", "Right, classes not kept", "%"),
        ("forget_accuracy", "Right, other forgotten data", "%"),
        ("held_out_accuracy", "Right, held-out data", "%"),
        ("forget_loss", "Loss, forgotten", ""),
        ("held_out_loss", "Loss, held-out", ""),
        ("retain_accuracy", "Right, data kept", "%"),
    ]
    shown = [one for one in names if choice["original"][one[0]] is not None]
    labels = [
        "gamma",
        "Weights reset",
        *(label for _, label, _ in shown),
        "Distance",
        "Met as unseen",
    ]
    body = []
    for one in choice["trials"]:
        mark = " (chosen)" if one["gamma"] == choice["gamma"] else ""
        cells = [f"<b>{one['gamma']:g}</b>{mark}", f"{one['selected_entries']:,}"]
        for name, _, unit in shown:
            value = one["behaviour"][name]
            cells.append("-" if value is None else f"{value:.1f} %" if unit else f"{value:.3f}")
        cells.append(f"{one['distance']:.1f}")
        cells.append("yes" if one["as_unseen"] else "no")
        body.append(
            "".join(
                f'<td class="n" data-label="{escape(label)}">{cell}</td>'
                for label, cell in zip(labels, cells, strict=True)
            )
        )
    head = "".join(f'<th class="h">{escape(label)}</th>' for label in labels)
    return (
        "<p>gamma was chosen without test data, by short trials on copies of the model: "
        f"{escape(choice['reason'])}.</p>"
        f'<div class="wide"><table class="figures"><thead><tr>{head}</tr></thead><tbody>'
        + "".join(f"<tr>{cells}</tr>" for cells in body)
        + "</tbody></table></div>"
    )


def _average(report: Told) -> str:
    after = report["scores"].get("after")
    found = after.get("average_gap", {}) if isinstance(after, Mapping) else {}
    if found.get("value") is None:
        return ""
    among = found.get("gold_to_gold")
    beside = "" if among is None else f" Between retrained models it is {among:.2f}."
    return (
        f"<p>Average gap: {found['value']:.2f} percentage points over four of these figures "
        f"({escape(found['meaning'])}).{beside}</p>"
    )


def _plots(before: Any, after: Any) -> str:
    if not isinstance(after, Mapping):
        return ""
    unseen = "forget_test" if "forget_test" in after.get("histograms", {}) else "test"
    words = "similar new data" if unseen == "forget_test" else "new data"
    series = [
        ("forgotten, original model", BEFORE, False, before, "forget"),
        ("forgotten, unlearned model", AFTER, False, after, "forget"),
        ("forgotten, retrained model", GOLD, False, after.get("gold"), "forget"),
        (f"{words}, unlearned", UNSEEN, True, after, unseen),
    ]
    aim = "green line (retrained)" if after.get("gold") else "grey line (new data)"
    drawn = [
        _histogram(series, "confidence", aim),
        _histogram(series, "loss", aim),
        _roc(before, after),
    ]
    return f'<div class="plots">{"".join(drawn)}</div>' if any(drawn) else ""


def _figure(title: str, drawing: str, caption: str) -> str:
    return (
        f"<figure><h3>{escape(title)}</h3>{drawing}<figcaption>{escape(caption)}</figcaption>"
        "</figure>"
    )


def _histogram(series: Sequence[tuple[str, str, bool, Any, str]], kind: str, aim: str) -> str:
    edges = _CONFIDENCE if kind == "confidence" else _LOSS
    lines = []
    for name, colour, dashed, score, of in series:
        counts = score.get("histograms", {}).get(of, {}) if isinstance(score, Mapping) else {}
        if len(counts.get(kind, ())) == len(edges) - 1:
            total = sum(counts[kind])
            shares = [100 * count / total for count in counts[kind]]
            lines.append(Line(name, colour, svg.steps(shares, edges), dashed))
    if not lines:
        return ""
    top = max(y for line in lines for _, y in line.points)
    y = Axis("share of the samples", 0, top * 1.05 or 1, _ticks(top, "%"))
    if kind == "confidence":
        x = Axis(
            "probability given to the right answer",
            0,
            100,
            [(v, f"{v} %") for v in range(0, 101, 25)],
        )
        title, caption = (
            "How sure the model is",
            "Left: the model does not know the answer. Right: it is certain. The blue line "
            f"(unlearned) should lie on the {aim}, not on the orange one (original).",
        )
    else:
        marks = [(1e-6, "0.000001"), (1e-4, "0.0001"), (1e-2, "0.01"), (1.0, "1"), (100.0, "100")]
        x = Axis("loss (logarithmic)", _LOSS[0], _LOSS[-1], marks, log=True)
        title, caption = (
            "How surprised the model is",
            "Left: what the model knows by heart. Right: what it would not have said. Again the "
            f"blue line should lie on the {aim}.",
        )
    return _figure(title, svg.chart(lines, x, y, title=title), caption)


def _ticks(top: float, unit: str) -> list[tuple[float, str]]:
    step = next((s for s in (0.5, 1, 2, 5, 10, 20) if top / s <= 6), 25)
    return [(i * step, f"{i * step:g} {unit}") for i in range(int(top / step) + 1)]


def _roc(before: Any, after: Any) -> str:
    lines = [Line("guessing", "#b9c0c7", [(0, 0), (100, 100)], dashed=True)]
    gold = after.get("gold")
    for name, colour, score in (
        ("original", BEFORE, before),
        ("unlearned", AFTER, after),
        ("retrained", GOLD, gold),
    ):
        attack = score.get("attacks", {}).get("threshold_loss") if score else None
        if attack and attack["roc"]:
            points = [(100 * a, 100 * b) for a, b in attack["roc"]]
            lines.append(Line(name, colour, points))
    if len(lines) == 1:
        return ""
    ticks = [(v, f"{v} %") for v in range(0, 101, 25)]
    drawing = svg.chart(
        lines,
        Axis("new data wrongly called training data", 0, 100, ticks),
        Axis("forgotten data recognised", 0, 100, ticks),
        title="ROC of the attack on the loss",
    )
    return _figure(
        "Can the forgotten data be recognised?",
        drawing,
        "Each point is an attacker with another threshold on the loss. On the diagonal he might as "
        "well guess, which is the aim; far above it he recognises the forgotten data, far below it "
        "they look stranger than new data.",
    )


def _attacks(report: Told) -> str:
    parts = []
    for name, one in report_rows.attacks(report):
        parts.append(
            f"<details><summary>{escape(name.replace('_', ' '))}</summary><ul>"
            f"<li>Looks at: {escape(one['feature'])}</li>"
            f"<li>Attacker: <code>{escape(one['attacker'])}</code></li>"
            f"<li>Fitted on: {escape(one['fitted_on'])}</li>"
            f"<li>How to read it: {escape(one['orientation'])}</li></ul></details>"
        )
    return "".join(parts)


def _layers(report: Told) -> str:
    chosen = [layer for layer in report["layers"] if layer["selected"]]
    if not chosen:
        return ""
    shown = chosen
    note = f"All {len(chosen)} parameters with selected weights, in the order of the model."
    if len(chosen) > MOST_BARS:
        largest = sorted(chosen, key=lambda one: -one["selected"] / one["entries"])[:MOST_BARS]
        kept = {one["name"] for one in largest}
        shown = [one for one in chosen if one["name"] in kept]
        note = f"The {MOST_BARS} parameters with the largest share, of {len(chosen)}."
    rows = [
        (one["name"], one["selected"] / one["entries"], f"{one['selected'] / one['entries']:.1%}")
        for one in shown
    ]
    drawing = svg.bars(rows, title="share of each parameter that was selected", colour=AFTER)
    return _figure("Share of each layer that was selected", drawing, note)


def _gamma(sweep: Told | None) -> str:
    if not sweep or not sweep["points"]:
        return ""
    points = sweep["points"]
    gammas = [point["gamma"] for point in points]
    x = Axis("gamma", min(gammas), max(gammas), [(g, f"{g:g}") for g in gammas], log=True)
    percent = Axis("per cent", 0, 100, [(v, f"{v} %") for v in range(0, 101, 25)])
    share = [(p["gamma"], 100 * p["selected_fraction"]) for p in points]
    chosen = svg.chart([Line("all weights", AFTER, share)], x, percent, title="selected share")
    drawn = [
        _figure("Weights reset", chosen, "The larger gamma, the fewer weights are reset."),
        *(
            _behaviour(points, x, percent, kind, words)
            for kind, words in (("zeroed", "Right after the reset"), ("tuned", "After training"))
        ),
    ]
    return f'<div class="plots">{"".join(drawn)}</div>'


def _behaviour(points: Sequence[Told], x: Axis, y: Axis, kind: str, words: str) -> str:
    lines = []
    names = (
        ("retain", "data kept", GOLD),
        ("forget", "forgotten data", BEFORE),
        ("test", "new data", UNSEEN),
    )
    for name, label, colour in names:
        values = [
            (p["gamma"], p[kind][f"{name}.accuracy"])
            for p in points
            if f"{name}.accuracy" in p[kind]
        ]
        if values:
            lines.append(Line(label, colour, values))
    if not lines:
        return ""
    return _figure(words, svg.chart(lines, x, y, title=words), "Accuracy against gamma.")


def _origin(report: Told) -> str:
    rows = list(report_rows.digests(report))
    rows += [(name, version) for name, version in report["versions"].items()]
    body = "".join(
        f"<tr><td>{escape(what)}</td><td><code>{escape(str(value))}</code></td></tr>"
        for what, value in rows
    )
    return (
        "<p>The file <code>report.json</code> holds everything on this page and the digests of "
        "every weight tensor. Whoever has it and the model can check that they belong together, "
        "and with the original model that no more was touched than is said here:</p>"
        f"<pre>{escape(report_rows.VERIFY)}\n{escape(report_rows.VERIFY_BOTH)}</pre>"
        "<p>The forgotten samples are named there by salted hashes only: someone who holds a "
        "sample can look it up, nobody else can tell which they were.</p>"
        f'<div class="wide"><table><tbody>{body}</tbody></table></div>'
    )
