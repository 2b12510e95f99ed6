"""A report as Markdown, and as the section of a model card."""

from __future__ import annotations

from deepclean_hooks.report import rows
from deepclean_hooks.report.rows import Told


def markdown(report: Told) -> str:
    """The whole report: what was asked and done, the table, the caveats, how to verify."""
    lines = ["# Unlearning report", ""]
    lines += [*_list("What was asked", rows.asked(report))]
    lines += [*_list("What was done", rows.done(report))]
    lines += ["## Did it work?", "", *_table(report), ""]
    lines += _attacks(report)
    lines += [*_list("What these figures do not show", rows.caveats(report))]
    lines += ["## How to verify it", "", *_verify(report), ""]
    return "\n".join(lines)


def model_card(report: Told) -> str:
    """A section `## Unlearning` to append to the README.md of a model on the Hugging Face Hub."""
    lines = ["## Unlearning", ""]
    lines += [" ".join([*rows.asked(report), *rows.done(report)]), ""]
    lines += [*_table(report), ""]
    lines += ["Limits:", "", *(f"- {_safe(text)}" for text in rows.caveats(report)), ""]
    lines += ["Verification:", "", *_verify(report), ""]
    return "\n".join(lines)


def _list(title: str, items: list[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {_safe(item)}" for item in items), ""]


def _table(report: Told) -> list[str]:
    found = rows.rows(report)
    if not found:
        return ["The model was not scored."]
    head = "| | original | unlearned | retrained | gap | verdict |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: | --- |"]
    return lines + [f"| {' | '.join(row.cells())} | {row.verdict} |" for row in found]


def _attacks(report: Told) -> list[str]:
    found = rows.attacks(report)
    if not found:
        return []
    lines = ["## How the attackers worked", ""]
    for name, one in found:
        lines.append(
            f"- **{name.replace('_', ' ')}**: looks at: {_safe(one['feature'])}; attacker: "
            f"`{one['attacker']}`; fitted on {_safe(one['fitted_on'])}. "
            f"Reading: {_safe(one['orientation'])}."
        )
    return [*lines, ""]


def _verify(report: Told) -> list[str]:
    lines = ["```bash", rows.VERIFY, rows.VERIFY_BOTH, "```", ""]
    lines += [f"- SHA-256 of the {what}: `{value}`" for what, value in rows.digests(report)]
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    return [*lines, f"- versions: {versions}"]


def _safe(text: str) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
