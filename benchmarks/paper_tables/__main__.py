"""DeepClean's Tables 1 to 4, and what goes beyond them, by one command.

    python -m benchmarks.paper_tables --scale smoke
    python -m benchmarks.paper_tables --scale small --data cifar10 --data-dir DATA
    python -m benchmarks.paper_tables --scale full --data cifar10 --network vgg16 \\
        --data-dir DATA --device cuda --recipe paper --ablations

Every cell, one method on one scenario and seed, is a file in the cache, and so is every trained
network: a run that was killed goes on where it was, and several processes (one a GPU, each with
other --seeds or --scenarios) fill one cache together. --collect writes what is there and runs
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import machine

from .cases import Case
from .cells import BOUNDS, cell, cell_file
from .collect import collected, origin, write
from .data import KINDS
from .figures import frontier
from .methods import ABLATIONS, AT, BUDGETED, CONTENDERS, MAIN, MORE, contender
from .networks import NETWORKS
from .setups import SCALES, SCENARIOS, Setup, setup
from .stopwatch import warm_up
from .tables import placed, tables

ROOT = Path(__file__).resolve().parent.parent.parent
SHOWN = ("acc_dr", "acc_df", "acc_test", "mia", "average_gap", "seconds", "time_ratio")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", choices=list(SCALES), default="smoke")
    parser.add_argument("--data", choices=list(KINDS), help="default: the scale's")
    parser.add_argument("--data-dir", type=Path, help="with load.py, or torchvision's downloads")
    parser.add_argument("--network", choices=NETWORKS, help="default: the scale's")
    parser.add_argument("--recipe", choices=["paper", "fast"], help="default: the scale's")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=["random", "class"])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; smoke: 0")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"of {', '.join(CONTENDERS)}, or METHOD@EPOCHS; default: {', '.join(MAIN)}; "
        "all at the smoke scale",
    )
    parser.add_argument("--ablations", action="store_true", help="those too, with the first seed")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[], help="of epochs, for the frontier"
    )
    parser.add_argument("--device", default="cpu", help="where networks and data lie")
    parser.add_argument("--cache", type=Path, default=Path("build/paper_tables"))
    parser.add_argument("--collect", action="store_true", help="run nothing, write what is there")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results")
    parser.add_argument("--page", type=Path, help="Markdown with marks, such as docs/results.md")
    parser.add_argument("--figure", type=Path, help="default: in docs/figures; smoke: none")
    return parser.parse_args()


def wanted(options: argparse.Namespace, seeds: list[int]) -> Iterator[tuple[int, str, str]]:
    """(seed, scenario, method), the first seed's complete before the next begins."""
    everything = [*MAIN, *MORE] if options.scale == "smoke" else list(MAIN)
    methods = [*BOUNDS, *(options.methods or everything)]
    methods += [f"{name}{AT}{count}" for count in options.budgets for name in BUDGETED]
    for seed in seeds:
        for group in (methods, list(ABLATIONS) if options.ablations and seed == seeds[0] else []):
            for scenario in options.scenarios:
                for method in group:
                    if method in BOUNDS or scenario in contender(method).scenarios:
                        yield seed, scenario, method


def run(options: argparse.Namespace, chosen: Setup) -> None:
    """Every cell that is not there yet."""
    seeds = options.seeds or ([0] if options.scale == "smoke" else [0, 1, 2])
    warm_up()
    origin(chosen, machine())
    cases: dict[tuple[int, str], Case] = {}
    for seed, scenario, method in wanted(options, seeds):
        case = cases.get((seed, scenario)) or Case(chosen, scenario, seed)
        if cell_file(case, method).exists():
            continue
        cases[(seed, scenario)] = case
        row = cell(case, method)
        figures = (f"{name} {row[name]:.2f}" for name in SHOWN if row[name] is not None)
        print(f"seed {seed}  {scenario:6}  {method:18}", *figures, sep="  ", flush=True)


def main() -> None:
    options = arguments()
    chosen = setup(
        options.scale,
        options.data,
        options.network,
        options.recipe,
        data_dir=options.data_dir,
        cache=options.cache,
        device=options.device,
    )
    for name in options.methods or []:
        contender(name)
    if not options.collect:
        run(options, chosen)
    stem = f"paper_tables_{chosen.scale}_{chosen.data}_{chosen.network}"
    told = collected(chosen, machine())
    write(told, options.output or ROOT / "benchmarks" / "results" / f"{stem}.json")
    if options.figure or options.scale != "smoke":
        frontier(told, options.figure or ROOT / "docs" / "figures" / f"{stem}.svg")
    if options.page:
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(placed(page, stem, tables(told)), encoding="utf-8")
    print(tables(told))


if __name__ == "__main__":
    main()
