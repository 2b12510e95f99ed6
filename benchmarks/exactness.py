"""How far the Fisher diagonal is from one-sample-at-a-time float64 autograd, for every model of the
test table.

    PYTHONPATH=tests python -m benchmarks.exactness [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from benchmarks.lab.results import write
from deepclean_hooks import fisher_diagonal
from lab.cases import CASES
from lab.reference import relative_error, squared_gradients

SAMPLES = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'model':42} {'entries':>10} {'float64':>9} {'float32':>9}  one-sample loop")
    for name, case in CASES.items():
        model, (x, y) = case.model(), case.batch(SAMPLES)
        truth = squared_gradients(model, x, y)
        single = fisher_diagonal(model, TensorDataset(x, y), batch_size=4, progress=False)
        x = x.double() if x.is_floating_point() else x
        double = fisher_diagonal(model.double(), TensorDataset(x, y), batch_size=4, progress=False)
        row = {
            "model": name,
            "entries": sum(t.numel() for t in truth.values()),
            "float64": relative_error(double.sums, truth),
            "float32": relative_error(single.sums, truth, zero=1e-11),
            "one_sample_loop": double.settings["one_sample_loop"],
        }
        rows.append(row)
        looped = ", ".join(row["one_sample_loop"]) or "-"
        print(
            f"{name:42} {row['entries']:>10} {row['float64']:9.0e} {row['float32']:9.0e}  {looped}",
            flush=True,
        )
    if options.json:
        write(options.json, samples=SAMPLES, rows=rows)


if __name__ == "__main__":
    main()
