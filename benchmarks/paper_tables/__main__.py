"""DeepClean's Tables 1 to 4, and what goes beyond them, by one command.

    python -m benchmarks.paper_tables --scale smoke
    python -m benchmarks.paper_tables --scale small --data cifar10 --data-dir DATA
    python -m benchmarks.paper_tables --scale full --data cifar10 --network vgg16 \\
        --data-dir DATA --device cuda --recipe paper --ablations
    python -m benchmarks.paper_tables --scale full --data cifar10 --network resnet20 \\
        --data-dir DATA --checkpoint resnet20.th --classes 0 1 2 3 4 5 6 7 8 9 --seeds 0 \\
        --epochs 1 --methods ssd assd class-projection deepclean fine-tune

Every cell, one method on one scenario and seed, is a file in the cache, and so is every trained
network: a run that was killed goes on where it was, and several processes (one a GPU, each with
other --seeds or --scenarios) fill one cache together. --collect writes what is there and runs
nothing. With --classes each of these classes is forgotten in turn from the same original; with
--checkpoint that is a network which others trained, and rows have no gold beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lab.data import KINDS
from benchmarks.lab.results import RESULTS, ROOT, store
from benchmarks.lab.timer import warm_up

from .cases import Case
from .cells import BOUNDS, cell, cell_file
from .collect import collected, origin
from .figures import frontier
from .methods import ABLATIONS, AT, BUDGETED, CONTENDERS, MAIN, MORE, contender
from .networks import NETWORKS
from .setups import SCALES, SCENARIOS, Setup, setup
from .tables import placed, tables

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
    parser.add_argument("--classes", type=int, nargs="+", help="in turn; default: label 0 alone")
    parser.add_argument("--checkpoint", type=Path, help="weights of the original; no gold then")
    parser.add_argument("--epochs", type=int, help="of fine-tuning (default: the paper's)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; smoke: 0")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"of {', '.join(CONTENDERS)}, or METHOD@EPOCHS; default: {', '.join(MAIN)}; "
        "all at the smoke scale".replace("%", "%%"),
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


def scenarios(options: argparse.Namespace) -> list[str]:
    """Those asked for, "class" being each of the classes in turn."""
    if options.classes is None:
        return list(options.scenarios)
    each = [f"class-{label}" for label in options.classes]
    return [one for s in options.scenarios for one in (each if s == "class" else [s])]


def wanted(options: argparse.Namespace, seeds: list[int]) -> Iterator[tuple[int, str, str]]:
    """(seed, scenario, method), the first seed's complete before the next begins."""
    everything = [*MAIN, *MORE] if options.scale == "smoke" else list(MAIN)
    bounds = [name for name in BOUNDS if name != "gold" or options.checkpoint is None]
    methods = [*bounds, *(options.methods or everything)]
    methods += [f"{name}{AT}{count}" for count in options.budgets for name in BUDGETED]
    for seed in seeds:
        for group in (methods, list(ABLATIONS) if options.ablations and seed == seeds[0] else []):
            for scenario in scenarios(options):
                for method in group:
                    if method in BOUNDS or contender(method).serves(scenario):
                        yield seed, scenario, method


def run(options: argparse.Namespace, chosen: Setup) -> None:
    """Every cell that is not there yet."""
    seeds = options.seeds or ([0] if options.scale == "smoke" else [0, 1, 2])
    warm_up()
    origin(chosen)
    cases: dict[tuple[int, str], Case] = {}
    for seed, scenario, method in wanted(options, seeds):
        case = cases.get((seed, scenario)) or Case(chosen, scenario, seed)
        if cell_file(case, method).exists():
            continue
        cases[(seed, scenario)] = case
        row = cell(case, method)
        figures = (f"{name} {row[name]:.2f}" for name in SHOWN if row[name] is not None)
        print(f"seed {seed}  {scenario:7}  {method:18}", *figures, sep="  ", flush=True)


def main() -> None:
    options = arguments()
    chosen = setup(
        options.scale,
        options.data,
        options.network,
        options.recipe,
        epochs=options.epochs,
        checkpoint=options.checkpoint,
        data_dir=options.data_dir,
        cache=options.cache,
        device=options.device,
    )
    for name in options.methods or []:
        contender(name)
    if not options.collect:
        run(options, chosen)
    stem = f"paper_tables_{chosen.scale}_{chosen.data}_{chosen.network}"
    if options.output is not None:
        stem = options.output.stem
    elif chosen.checkpoint is not None:
        stem = f"{stem}_{chosen.checkpoint.stem}"
    told = collected(chosen)
    store(options.output or RESULTS / f"{stem}.json", told)
    if options.figure or (options.scale != "smoke" and chosen.checkpoint is None):
        frontier(told, options.figure or ROOT / "docs" / "figures" / f"{stem}.svg")
    if options.page:
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(placed(page, stem, tables(told)), encoding="utf-8")
    print(tables(told))


if __name__ == "__main__":
    main()
