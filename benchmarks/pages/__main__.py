"""Writes the tables of the docs anew from the JSON files in benchmarks/results.

    python -m benchmarks.pages

A table stands between `<!-- table: name -->` and `<!-- end -->`, those of `benchmarks.paper_tables`
between marks of their own; the prose around them stays. A file without its place is an error, and
so is a file that no table is made of: tests compare every page with its files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lab.results import RESULTS, ROOT, read
from benchmarks.pages import costs, forgetting
from benchmarks.pages.markdown import placed
from benchmarks.paper_tables import tables as paper_tables

EVALUATION, PERFORMANCE, OUTCOMES = "evaluation", "performance", "results"  # pages in docs/
# file: (page, mark, table)
TABLES: dict[str, tuple[str, str, Callable[[Any], str]]] = {
    "fisher_cpu": (PERFORMANCE, "fisher", costs.fisher),
    "fisher_cpu_two_threads": (PERFORMANCE, "two threads", costs.fisher),
    "memory_cpu": (PERFORMANCE, "memory", costs.memory),
    "requests_cpu": (PERFORMANCE, "requests", costs.requests),
    "fisher_peers_cpu": (PERFORMANCE, "peers", costs.peers),
    "growth_cpu": (PERFORMANCE, "growth", costs.growth),
    "guard_cpu": (PERFORMANCE, "guard", costs.guard),
    "sharded_cpu": (PERFORMANCE, "sharded", costs.sharded),
    "projection_cpu": (PERFORMANCE, "projection", costs.projection),
    "exactness": (PERFORMANCE, "exactness", costs.exactness),
    "evaluate_cpu": (EVALUATION, "evaluation", costs.evaluation),
    "gamma_auto_cifar10": (EVALUATION, "gamma auto", forgetting.gamma_auto),
    "cifar10_resnet20_class": (OUTCOMES, "pretrained, class", forgetting.pretrained),
    "cifar10_resnet20_random": (OUTCOMES, "pretrained, random", forgetting.pretrained),
    "cifar10_class": (OUTCOMES, "evaluated, class", forgetting.evaluated),
    "cifar10_random": (OUTCOMES, "evaluated, random", forgetting.evaluated),
    "trainer_vit_cifar10": (OUTCOMES, "trainer", forgetting.in_a_trainer),
}


def page_of(file: Path) -> Path:
    """The page that a result file is shown on."""
    name = TABLES[file.stem][0] if file.stem in TABLES else OUTCOMES
    return ROOT / "docs" / f"{name}.md"


def shown(page: str, file: Path) -> str:
    """The text of the page with the table of a result file in its place."""
    if file.stem not in TABLES:
        return paper_tables.placed(page, file.stem, paper_tables.tables(read(file)))
    _, mark, render = TABLES[file.stem]
    return placed(page, mark, render(read(file)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for file in sorted(RESULTS.glob("*.json")):
        page = page_of(file)
        text = page.read_text(encoding="utf-8")
        page.write_text(shown(text, file), encoding="utf-8")


if __name__ == "__main__":
    main()
