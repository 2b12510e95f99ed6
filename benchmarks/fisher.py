"""What the exact Fisher diagonal costs: its time over that of a plain forward and backward of the
same batches.

    OMP_NUM_THREADS=1 python -m benchmarks.fisher [--models resnet18 ...] [--json FILE]
    OMP_NUM_THREADS=1 python -m benchmarks.fisher --peers [--json FILE]
    python -m benchmarks.fisher --device cuda [--tf32] [--peers] [--json FILE]

Both are run in turn in one process on the same batches with the same threads; the ratio is the
median over repeats, with the smallest and the largest beside it. "first" includes what happens once
for a model: probing, planning and the self-check against the one-sample loop. `--peers` puts other
libraries' ways beside ours (see peers.py) on one batch each; `--cpu-time` counts the processor
seconds of the one thread, for a machine that others use too. On a GPU the models are larger, each
row has the peak of the allocated memory beside the time, and `--tf32` lets both ways round products
to TF32, which measuring switches off otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.lab.models import ON_CPU, Batches, Network, of_device, plain_cnn
from benchmarks.lab.passes import MIB, exact, one_at_a_time, plain
from benchmarks.lab.results import write
from benchmarks.lab.timer import CPU, Timer
from benchmarks.peers import compared
from deepclean_hooks.model import no_trace
from deepclean_hooks.persample.engine import SquaredGradients

BESIDE_PEERS = {"plain CNN": Network(plain_cnn, 32, 32), **ON_CPU}


@dataclass(frozen=True)
class Bench:
    """Where and by which clock rows are measured; `tf32`: products are rounded to it all the
    same."""

    timer: Timer
    tf32: bool = False

    @property
    def device(self) -> torch.device:
        return self.timer.device

    @contextlib.contextmanager
    def as_measured(self, model: nn.Module) -> Iterator[None]:
        """As `fisher_diagonal` runs a model, TF32 on all the same if that was asked for."""
        with no_trace.no_trace(model):
            if self.tf32:
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            yield

    def row(self, name: str, count: int, repeats: int, loop: bool) -> dict[str, Any]:
        network = of_device(self.device)[name]
        model, batches = network.made(count, device=self.device)
        ratios, seconds = [], []
        timed = self.timer.seconds
        with self.as_measured(model):
            parameters = dict(model.named_parameters())
            first = timed(lambda: exact(SquaredGradients(model, parameters), batches))
            engine = SquaredGradients(model, parameters)
            engine.plan_for(batches[0])
            plain(model, batches[:2])
            for _ in range(repeats):
                # Half of the plain passes before and half after, so that drift of the machine
                # cancels.
                before = timed(lambda: plain(model, batches))
                ours = timed(lambda: exact(engine, batches))
                after = timed(lambda: plain(model, batches))
                seconds.append((before + after) / 2)
                ratios.append(ours / seconds[-1])
            base = statistics.median(seconds)
            result = {
                "model": name,
                "image": network.size,
                "batch": len(batches[0][1]),
                "entries": sum(p.numel() for p in parameters.values()),
                "plain_ms_per_batch": 1000 * base / count,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "ratio_first": first / base,
                "one_sample_loop_parameters": len(engine.notes),
            }
            if self.device.type == "cuda":
                result |= self.memory(model, batches[:2])
            if loop:
                few = batches[:1]
                base_few = timed(lambda: plain(model, few))
                looped = timed(lambda: one_at_a_time(model, parameters, few))
                result["ratio_of_one_sample_loop"] = looped / base_few
        return result

    def memory(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """What both ways allocate on a GPU above what is there; memory.py measures a CPU's."""

        def peak_mib(work: Callable[[], object]) -> float:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / MIB

        parameters = dict(model.named_parameters())
        return {
            "plain_mib": peak_mib(lambda: plain(model, batches)),
            "exact_mib": peak_mib(lambda: exact(SquaredGradients(model, parameters), batches)),
            "result_mib": 8 * sum(p.numel() for p in parameters.values()) / MIB,
        }

    def beside_peers(self, name: str, most: int) -> dict[str, Any]:
        """Our seconds for a batch of at most `most` samples, the plain pass's and the others'."""
        network = of_device(self.device, BESIDE_PEERS)[name]
        model, (batch,) = network.made(1, most, self.device)
        timed = self.timer.seconds
        with self.as_measured(model):
            engine = SquaredGradients(model, dict(model.named_parameters()))
            engine.plan_for(batch)
            plain(model, [batch])
            base = min(timed(lambda: plain(model, [batch])) for _ in range(2))
            ours = min(timed(lambda: exact(engine, [batch])) for _ in range(2))
        rows = compared(model, batch, timed)
        for row in rows.values():
            row["ratio"] = None if row["seconds"] is None else row["seconds"] / base
        cost = {"plain_seconds": base, "ratio": ours / base}
        return {"model": name, "samples": len(batch[1]), **cost, "peers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loop", action="store_true", help="time the one-sample loop too")
    parser.add_argument("--peers", action="store_true", help="other libraries, one batch each")
    parser.add_argument("--samples", type=int, default=8, help="of the batch that peers are given")
    parser.add_argument("--cpu-time", action="store_true", help="processor instead of wall time")
    parser.add_argument("--device", default=CPU, type=torch.device)
    parser.add_argument("--tf32", action="store_true", help="round products of both ways to TF32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(Timer(options.device, processor=options.cpu_time), options.tf32)
    told = {"clock": bench.timer.clock, "tf32": options.tf32}
    rows = []
    if options.peers:
        for name in options.models or of_device(options.device, BESIDE_PEERS):
            rows.append(bench.beside_peers(name, options.samples))
            print(json.dumps(rows[-1]), flush=True)
            if options.json:
                write(options.json, **told, rows=rows)
        return
    for name in options.models or of_device(options.device):
        rows.append(bench.row(name, options.batches, options.repeats, options.loop))
        print(
            "{model:24} {plain_ms_per_batch:8.0f} ms   ratio {ratio:.2f} "
            "[{ratio_min:.2f}, {ratio_max:.2f}]   "
            "first {ratio_first:.2f}".format(**rows[-1]),
            flush=True,
        )
    told |= {"batches": options.batches, "repeats": options.repeats}
    told["geometric_mean"] = statistics.geometric_mean(row["ratio"] for row in rows)
    print(f"geometric mean {told['geometric_mean']:.3f}")
    if options.json:
        write(options.json, **told, rows=rows)


if __name__ == "__main__":
    main()
