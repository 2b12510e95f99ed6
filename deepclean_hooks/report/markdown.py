"""A report as Markdown, and as the section of a model card. Text of the report stays text: no
markup, no new line."""

from __future__ import annotations

import re
from html import escape

from deepclean_hooks.report import rows
from deepclean_hooks.report.printable import printable
from deepclean_hooks.report.stored_report import Document


def markdown(report: Document) -> str:
    """The whole report: what was asked and done, the table, the caveats, how to verify."""
    lines = ["# Unlearning report", ""]
    lines += [*_list("What was asked", rows.asked(report))]
    lines += [*_list("What was done", rows.done(report))]
    lines += ["## Did it work?", "", *_table(report), ""]
    lines += _attacks(report)
    lines += [*_list("What these figures do not show", rows.caveats(report))]
    lines += ["## How to verify it", "", *_verify(report), ""]
    return "\n".join(lines)


def model_card(report: Document) -> str:
    """A section `## Unlearning` to append to the README.md of a model on the Hugging Face Hub."""
    lines = ["## Unlearning", ""]
    lines += [" ".join(map(text, [*rows.asked(report), *rows.done(report)])), ""]
    lines += [*_table(report), ""]
    lines += ["Limits:", "", *(f"- {text(caveat)}" for caveat in rows.caveats(report)), ""]
    lines += ["Verification:", "", *_verify(report), ""]
    return "\n".join(lines)


def text(value: object) -> str:
    """A text as Markdown that shows it and does nothing else: one line, no markup, no link."""
    line = escape(printable(" ".join(str(value).split())), quote=False)
    line = re.sub(r"([\\`*\[\]|~#!]|(?<!\w)_|_(?!\w))", r"\\\1", line)
    return line.replace("://", ":&#47;/").replace("www.", "www&#46;").replace("@", "&#64;")


def _list(title: str, items: list[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {text(item)}" for item in items), ""]


def _table(report: Document) -> list[str]:
    lines = [
        f"| {' | '.join(map(text, row.cells()))} | {text(row.verdict)} |"
        for row in rows.rows(report)
    ]
    head = "| | original | unlearned | retrained | gap | verdict |"
    ruler = "| --- | ---: | ---: | ---: | ---: | --- |"
    return [head, ruler, *lines] if lines else ["The model was not scored."]


def _attacks(report: Document) -> list[str]:
    lines = [
        f"- **{text(name)}**: looks at: {text(attack['feature'])}; attacker: "
        f"{text(attack['attacker'])}; fitted on {text(attack['fitted_on'])}. "
        f"Reading: {text(attack['orientation'])}."
        for name, attack in rows.attacks(report)
    ]
    return ["## How the attackers worked", "", *lines, ""] if lines else []


def _verify(report: Document) -> list[str]:
    lines = ["```bash", rows.VERIFY, rows.VERIFY_BOTH, "```", ""]
    lines += [f"- SHA-256 of the {what}: {text(value)}" for what, value in rows.digests(report)]
    versions = ", ".join(f"{text(name)} {text(v)}" for name, v in report["versions"].items())
    return [*lines, f"- versions: {versions}"]
