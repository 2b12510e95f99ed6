"""What a person shows their auditor: what was measured, selected, changed, held and scored, and
how."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deepclean_hooks.report import html, markdown, small_sets, stored_report
from deepclean_hooks.report.layers import Layer
from deepclean_hooks.report.printable import printable
from deepclean_hooks.report.stored_report import SCHEMA


@dataclass(frozen=True)
class Report:
    """The account of one unlearning run; None where a phase has not happened yet.

    Fractions are of 0 to 1: `selected_fraction` of all trainable entries, `dead_fraction` of the
    selected ones. Counted bit by bit at the end: `frozen_entries_moved`, and `restored_entries`,
    those that the reset changed and that hold their old value again. `seconds`: wall-clock by
    phase. `scores`: `before` and `after`, each an evaluation, or the reason why there is none.
    `effect`: what became of the selected entries. `may_change_entries`: those selected or free to
    train; all others are frozen. `forgotten`: salted hashes of the forget samples, and the salt.
    `checkpoint_before` and `checkpoint_after`: SHA-256 of each tensor of the model's state_dict.
    `tied`: each further name there of a tensor, and its first name.
    `gamma_choice`: how gamma="auto" was settled, the rule and the trials; empty where gamma was
    given.
    """

    method: str
    settings: dict[str, Any]
    phase: str
    forget_samples: int | None = None
    retain_samples: int | None = None
    overlapping_samples: int | None = None
    measurement: dict[str, Any] = field(default_factory=dict)
    criterion: str | None = None
    effect: str | None = None
    trainable_entries: int | None = None
    candidate_entries: int | None = None
    selected_entries: int | None = None
    selected_fraction: float | None = None
    held_back_entries: int | None = None
    may_change_entries: int | None = None
    dead_fraction: float | None = None
    layers: tuple[Layer, ...] = ()
    norm_statistics: str | None = None
    optimizer_steps: int | None = None
    frozen_entries_moved: int | None = None
    restored_entries: int | None = None
    model_before: str | None = None
    model_after: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=lambda: versions())
    forgotten: dict[str, Any] = field(default_factory=dict)
    checkpoint_before: dict[str, str] = field(default_factory=dict)
    checkpoint_after: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    gamma_choice: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, *, exact: bool = False) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts.

        Losses, classes and attacks of sets and classes of fewer than ten samples are left out, and
        `withheld` says so: they tell of single samples. An auditor gets them with `exact`.
        """
        whole = {"schema": SCHEMA, **dataclasses.asdict(self)}
        shown = {**whole, "withheld": {}} if exact else small_sets.withheld(whole)
        return {**shown, "digest": stored_report.digest(shown)}

    def to_json(self, *, indent: int | None = 2, exact: bool = False) -> str:
        """The report as JSON text; `exact` as in `to_dict`."""
        return json.dumps(self.to_dict(exact=exact), indent=indent, default=str)

    def to_plain(self) -> dict[str, Any]:
        """What `of_plain` makes the report of again: the exact `to_dict` as it is after JSON."""
        plain: dict[str, Any] = json.loads(self.to_json(exact=True))
        return plain

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Report:
        """The report of a stored run, with the versions of what goes on with it now."""
        known = {f.name for f in dataclasses.fields(cls)} - {"versions"}
        values = {name: value for name, value in plain.items() if name in known}
        values["layers"] = tuple(Layer(**layer) for layer in plain["layers"])
        values["warnings"] = tuple(plain["warnings"])
        return cls(**values)

    def to_html(
        self,
        sweep: Mapping[str, Any] | None = None,
        compared: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        exact: bool = False,
    ) -> str:
        """The report as one self-contained page for a reader who is no engineer; `sweep`, the
        `to_dict()` of a gamma sweep, adds its curves, and `compared`, the `to_dict()` of the
        evaluation of each method by its name, a table of the methods side by side; `exact` as in
        `to_dict`."""
        shown = {
            method: evaluation if exact else small_sets.evaluation(evaluation)
            for method, evaluation in (compared or {}).items()
        }
        return html.page(self.to_dict(exact=exact), sweep, shown)

    def to_markdown(self, *, exact: bool = False) -> str:
        """The report as Markdown; `exact` as in `to_dict`."""
        return markdown.markdown(self.to_dict(exact=exact))

    def to_model_card(self, *, exact: bool = False) -> str:
        """A section for the README.md of the model on the Hugging Face Hub; `exact` as in
        `to_dict`."""
        return markdown.model_card(self.to_dict(exact=exact))

    def __str__(self) -> str:
        """The report as a page of text."""
        blocks = (self._request(), self._selection(), self._held(), self._scores(), self._origin())
        return "\n".join(printable(line) for block in blocks for line in block)

    def _request(self) -> list[str]:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        lines = [f"Unlearning report: {self.method} ({settings}), phase: {self.phase}"]
        if self.forget_samples is not None:
            lines.append(
                f"  samples      forget {self.forget_samples}, retain {self.retain_samples}"
                + (f", in both {self.overlapping_samples}" if self.overlapping_samples else "")
            )
        if self.gamma_choice:
            lines.append(f"  gamma        chosen without test data: {self.gamma_choice['reason']}")
        for warning in self.warnings:
            lines.append(f"  WARNING      {warning}")
        return lines

    def _selection(self) -> list[str]:
        if self.selected_entries is None or self.selected_fraction is None:
            return []
        lines = [
            f"  selected     {self.selected_entries} of {self.trainable_entries} trainable entries "
            f"({self.selected_fraction:.2%}), where {self.criterion}; {self.effect}; candidates "
            f"{self.candidate_entries}; held back as rounding noise {self.held_back_entries}"
        ]
        if self.dead_fraction is not None:
            lines.append(f"  dead         {self.dead_fraction:.2%} of the selected entries")
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            if layer.selected:
                share = layer.selected / layer.entries
                lines.append(
                    f"    {layer.name:{width}}  {layer.selected:>10} of {layer.entries:<10} "
                    f"{share:7.2%}"
                )
        return lines

    def _held(self) -> list[str]:
        if self.frozen_entries_moved is None:
            return []
        return [
            f"  held         {self.frozen_entries_moved} frozen entries moved (compared bit for "
            f"bit) in {self.optimizer_steps} optimizer steps; normalisation statistics: "
            f"{self.norm_statistics}"
        ]

    def _scores(self) -> list[str]:
        lines = []
        for when, score in self.scores.items():
            text = score if isinstance(score, str) else _score_line(score)
            lines.append(f"  {when:<12} {text}")
        return lines

    def _origin(self) -> list[str]:
        lines = []
        if self.seconds:
            spent = ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items())
            lines.append(f"  seconds      {spent}")
        if self.model_before:
            after = f", after {self.model_after[:16]}" if self.model_after else ""
            lines.append(f"  model        SHA-256 before {self.model_before[:16]}{after}")
        lines.append("  versions     " + ", ".join(f"{k} {v}" for k, v in self.versions.items()))
        return lines


def _score_line(score: dict[str, Any]) -> str:
    """Accuracies and membership rate of an evaluation in one line, each with its gap to gold, if
    a gold model is given."""
    figures, gaps = score["figures"], score["gaps"]

    def words(name: str) -> str:
        gap = f" ({gaps[name]:+.2f} to gold)" if name in gaps else ""
        return f"{figures[name]:.2f} %{gap}"

    parts = [f"{name} {words(f'{name}.accuracy')}" for name in score["sets"]]
    rate = "attack.entropy_regression.rate"
    if rate in figures:
        parts.append(f"{words(rate)} of forget called members")
    else:
        attack = score["attacks"].get("entropy_regression", {})
        reason = attack.get("reasons", {}).get("rate", "not asked for")
        parts.append(f"membership not computed ({reason})")
    return "accuracy " + ", ".join(parts)


def versions() -> dict[str, str]:
    """The versions of what computed this."""
    from deepclean_hooks._version import __version__

    return {
        "deepclean-hooks": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
