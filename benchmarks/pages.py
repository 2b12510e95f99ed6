"""Writes the tables of docs/performance.md anew from the JSON files in benchmarks/results.

    python -m benchmarks.pages

A table stands between `<!-- table: name -->` and `<!-- end -->`; one without its JSON file, or
without these marks, is left as it is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.lab.results import RESULTS, ROOT, read

PAGE = ROOT / "docs" / "performance.md"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def fisher(told: Any) -> str:
    head = ["model", "image", "batch", "plain, ms a batch", "exact Fisher", "range"]
    loop = "ratio_of_one_sample_loop"
    looped = any(loop in row for row in told["rows"])
    rows = []
    for row in told["rows"]:
        span = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        setting = [row["model"], row["image"], row["batch"], f"{row['plain_ms_per_batch']:.0f}"]
        cost = [f"{row['ratio']:.2f}", span, *([f"{row[loop]:.1f}"] if loop in row else [])]
        rows.append([*setting, *cost])
    mean = f"Geometric mean {told['geometric_mean']:.2f}."
    return table([*head, *(["one-sample loop"] if looped else [])], rows) + f"\n\n{mean}"


def memory(told: Any) -> str:
    head = ["model", "plain, MiB", "exact Fisher, MiB", "of which result", "ratio beside it"]
    head.append("ratio of the process's memory")
    rows = []
    for row in told["rows"]:
        ours = row["torch"]
        sizes = (ours["plain_mib"], ours["exact_mib"], row["result_mib"])
        ratios = (row[where]["ratio_beside_the_result"] for where in ("torch", "process"))
        cells = [*(f"{size:.0f}" for size in sizes), *(f"{ratio:.2f}" for ratio in ratios)]
        rows.append([row["model"], *cells])
    return table(head, rows)


def requests(told: Any) -> str:
    head = ["request", "samples", "seconds", "of the first", "ms a sample"]
    head += [f"entries that differ, gamma {gamma}" for gamma in ("1.1", "2")]
    first = told["first"]
    rows = [[first["request"], told["images"], f"{first['seconds']:.0f}", "1", "", "", ""]]
    for row in told["later"]:
        differing = [f"{g['differing']} of {g['selected']}" for g in row["gamma"].values()]
        cost = [f"{row['seconds']:.1f}", f"{row['of_first']:.3f}", f"{row['ms_per_sample']:.1f}"]
        rows.append([row["request"], row["forget"], *cost, *differing])
    return table(head, rows)


def peers(told: Any) -> str:
    ways = list(told["rows"][0]["peers"])
    rows = []
    for row in told["rows"]:
        cells = [_peer(row["peers"][way]) for way in ways]
        rows.append([row["model"], row["samples"], f"**{row['ratio']:.2f}**", *cells])
    return table(["model", "samples", "this package", *ways], rows)


def _peer(found: Any) -> str:
    if found["seconds"] is None:
        return "does not run"
    wrong = f", off by {found['error']:.1g}" if found["error"] > 1e-5 else ""
    missing = f", {found['missing']} parameters missing" if found["missing"] else ""
    return f"{found['ratio']:.2f}{wrong}{missing}"


def growth(told: Any) -> str:
    head = ["growing", "entries", "image", "batch", "plain, s", "exact, s", "ratio"]
    rows: list[list[object]] = []
    for kind in ("batch", "parameters", "image", "threads"):
        for row in told.get(kind, ()):
            name = f"{kind}: {row['threads']}" if kind == "threads" else kind
            sizes = [row["entries"], row["image"], row["batch"]]
            cost = [f"{row['plain_seconds']:.2f}", f"{row['exact_seconds']:.2f}"]
            rows.append([name, *sizes, *cost, f"{row['ratio']:.2f}"])
    text = table(head, rows)
    one = told.get("processes", [])
    if one:
        share = one[1]["seconds"] / one[0]["seconds"]
        text += f"\n\nTwo processes need {share:.2f} of one process's time over the same set."
    return text


def guard(told: Any) -> str:
    head = ["model", "image", "batch", "optimizer", "free", "by", "plain step, ms", "held step"]
    head += ["range", "optimizer state, MiB"]
    rows = []
    for row in told["rows"]:
        way = "`run.compact()`" if row["compact"] else "guard"
        name, free = row["model"].split(",")[0], f"{row['free_fraction']:.0%}"
        setting = [name, row["image"], row["batch"], row["optimizer"], free, way]
        span = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        cost = [f"{row['plain_ms']:.0f}", f"{row['ratio']:.2f}", span, f"{row['state_mib']:.1f}"]
        rows.append([*setting, *cost])
    return table(head, rows)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "fisher": ("fisher_cpu.json", fisher),
    "two threads": ("fisher_cpu_two_threads.json", fisher),
    "memory": ("memory_cpu.json", memory),
    "requests": ("requests_cpu.json", requests),
    "peers": ("fisher_peers_cpu.json", peers),
    "growth": ("growth_cpu.json", growth),
    "guard": ("guard_cpu.json", guard),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    page = PAGE.read_text(encoding="utf-8")
    for name, (file, written) in TABLES.items():
        if (RESULTS / file).exists():
            block = f"<!-- table: {name} -->\n{written(read(RESULTS / file))}\n<!-- end -->"
            pattern = rf"<!-- table: {name} -->.*?<!-- end -->"
            page, count = re.subn(pattern, lambda _, block=block: block, page, flags=re.DOTALL)
            print(f"{name}: {'written' if count else 'has no place in the page'}")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
