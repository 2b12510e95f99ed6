"""What measuring and holding cost, as tables: one function for each result file."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import table


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


def exactness(told: Any) -> str:
    rows = told["rows"]
    worst = [f"{max(row[kind] for row in rows):.0e}" for kind in ("float64", "float32")]
    looped = sum(bool(row["one_sample_loop"]) for row in rows)
    head = ["models", "entries", "largest error, float64", "float32"]
    head.append("models with parameters in the one-sample loop")
    return table(head, [[len(rows), sum(row["entries"] for row in rows), *worst, looped]])


def sharded(told: Any) -> str:
    head = ["sums", "one process, MiB", "each of two, MiB", "share"]
    rows = []
    for row in told["rows"]:
        most = max(row["each_of_two_mib"])
        share = f"{100 * row['share_of_one_process']:.1f} %"
        rows.append([row["accumulate"], f"{row['one_process_mib']:.0f}", f"{most:.0f}", share])
    return table(head, rows)


def projection(told: Any) -> str:
    head = ["model", "image", "batch", "forward, ms a batch", "Gram matrices, ms a batch"]
    head += ["MiB a set", "projections, ms"]
    names = ("forward_ms", "gram_ms", "gram_mib", "projection_ms")
    rows = [
        [row["model"], row["image"], row["batch"], *(f"{row[name]:.0f}" for name in names)]
        for row in told["rows"]
    ]
    return table(head, rows)


def evaluation(told: Any) -> str:
    head = ["model", "data", "images", "forward passes, s", "evaluation, s", "ratio", "range"]
    seconds = [f"{told[name]:.0f}" for name in ("plain_seconds", "evaluate_seconds")]
    low, high = told["ratios"]
    span = [f"{told['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
    return table(head, [[told["model"], told["data"], told["images"], *seconds, *span]])
