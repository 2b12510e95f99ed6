"""The rows of a table that say how forgetting went, one model after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

import deepclean_hooks as deepclean
from scenarios import Recipe, Scenario, stopwatch
from text_table import Row

COLUMNS = {
    "model": "",
    "retain": ".1f",
    "forget": ".1f",
    "test": ".1f",
    "test of class": ".1f",
    "members": ".1f",
    "selected": ".1f",
    "dead": ".1f",
    "moved": "d",
    "seconds": ".1f",
}
HOW_TO_READ = """\
retain, forget, test, test of class: accuracy in %; members: % of the forget set that a membership
attacker (logistic regression on the entropy of the output) calls training samples. selected, dead:
% of the trainable weights that were reset, and % of these that no training can bring back; moved:
frozen weights that changed, counted bit by bit."""
AGAINST_GOLD = "In brackets: minus the gold model, where 0 is the aim."


def columns(scenario: Scenario) -> dict[str, str]:
    """The columns of a scenario's table."""
    return {k: v for k, v in COLUMNS.items() if scenario.forget_test or k != "test of class"}


class Play:
    """The rows of one scenario's table, one model after the other; `show` is called with each."""

    def __init__(
        self,
        scenario: Scenario,
        original: nn.Module,
        batch_size: int,
        show: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self.scenario, self.original, self.batch_size = scenario, original, batch_size
        self.show = show
        self.gold: deepclean.Evaluation | None = None
        self.rows: list[Row] = []

    def row(
        self,
        name: str,
        model: nn.Module,
        seconds: float | None,
        report: deepclean.Report | None = None,
    ) -> None:
        """Judges a model and adds its row."""
        sets = self.scenario.sets()
        scores = deepclean.evaluate(model, **sets, gold=self.gold, batch_size=self.batch_size)
        row = {"model": name, **figures(scores), **selection(report), "seconds": seconds}
        self.rows.append(row)
        self.show(row)

    def set_gold(self, model: nn.Module) -> None:
        """Later rows are compared with this model, which never saw the forget set."""
        sets = self.scenario.sets()
        self.gold = deepclean.evaluate(model, **sets, batch_size=self.batch_size)

    def unlearned(self, method: deepclean.Method, recipe: Recipe) -> deepclean.Report:
        """The rows right after the reset and after fine-tuning W_f; one measurement serves both."""
        model = copy.deepcopy(self.original)
        reading = {"scores": False, "batch_size": self.batch_size}
        run = deepclean.Session(model, method, **reading)
        run.measure(forget=self.scenario.forget, retain=self.scenario.retain)
        run.select()
        run.reset()
        before = sum(run.report.seconds.values())
        self.row("zeroed only", model, before, run.report)
        run.guard()
        recipe(model, self.scenario.retain)
        report = run.finish()
        self.row("DeepClean", model, sum(report.seconds.values()), report)
        return report

    def fine_tuned(self, recipe: Recipe) -> None:
        """The row of plain fine-tuning: the same recipe, every weight free."""
        model = copy.deepcopy(self.original)
        with stopwatch() as seconds:
            recipe(model, self.scenario.retain)
        self.row("fine-tune", model, seconds[0])


def figures(scores: deepclean.Evaluation) -> dict[str, float | None]:
    """The accuracies and the membership rate of a row, with their gaps to gold."""
    names = {"test of class": "forget_test.accuracy", "members": "attack.entropy_regression.rate"}
    names |= {name: f"{name}.accuracy" for name in ("retain", "forget", "test")}
    row: dict[str, float | None] = {}
    for column, name in names.items():
        row[column] = scores.figures().get(name)
        row[f"{column}_gap"] = scores.gaps.get(name)
    return row


def selection(report: deepclean.Report | None) -> dict[str, float | None]:
    """What was reset, in per cent."""
    if report is None or report.selected_fraction is None:
        return {}
    dead = report.dead_fraction
    return {
        "selected": 100 * report.selected_fraction,
        "dead": None if dead is None else 100 * dead,
        "moved": report.frozen_entries_moved,
    }
