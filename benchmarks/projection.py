"""What class projection costs in each layer: memory and time of its Gram matrices and projections.

    OMP_NUM_THREADS=1 python -m benchmarks.projection [--models resnet18 ...] [--json FILE]

For each weight: the size D of its Gram matrices and how many there are (groups), the memory of one
measurement in the float64 it is kept in, the time of the products a a^T of one batch, and that of
the two eigendecompositions and products which give W P^T. Time is that of the process on the CPU,
so that other jobs of the machine do not count: it needs one thread. The plain forward pass of the
same batch stands beside the whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lab.models import Network, resnet18, timm_model
from benchmarks.lab.passes import MIB
from benchmarks.lab.results import write
from benchmarks.lab.timer import Timer
from deepclean_hooks.measure.layer_inputs import Grams, LayerInputs
from deepclean_hooks.methods import ClassProjection
from deepclean_hooks.model import no_trace

TIMER = Timer(processor=True)
MODELS = {
    "resnet18": Network(resnet18, 32, 32),
    "vit_tiny": Network(timm_model("vit_tiny_patch16_224", img_size=96), 96, 32),
}


class TimedGrams(Grams):
    """Grams that note the seconds spent on each layer."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__(weights, LayerInputs())
        self.seconds: dict[str, float] = {}

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        start = TIMER.now()
        super()._linear(input, weight, bias)
        self._note(weight, start)

    def _convolution(
        self, spatial: int, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        start = TIMER.now()
        super()._convolution(spatial, input, weight, *args, **kwargs)
        self._note(weight, start)

    def _note(self, weight: Tensor, start: float) -> None:
        name = self._name(weight)
        if name is not None:
            spent = TIMER.now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Of the quickest run."""
    return min(TIMER.seconds(run) for _ in range(repeats))


def projected(rows: Tensor, forget: Tensor, retain: Tensor) -> Tensor:
    """W P^T (G, O, D)."""
    values: Tensor = rows @ ClassProjection().projection(forget, retain).mT
    return values


def measured(name: str, repeats: int) -> dict[str, Any]:
    network = MODELS[name]
    model, batches = network.made(2)
    weights = {n: p for n, p in model.named_parameters() if p.dim() >= 2}
    sets = [x for x, _ in batches]
    with no_trace.no_trace(model), torch.no_grad():
        plain = seconds(lambda: model(sets[0]), repeats)
        kept, spent = [], []
        for images in [*sets[:1] * repeats, *sets]:  # 1.2 GiB of Gram matrices for a ResNet-18
            grams = TimedGrams(weights)
            with grams:
                model(images)
            kept = [*kept[-1:], grams.sums]
            spent.append(grams.seconds)
    layers = []
    for key, forget in kept[1].items():
        retain = kept[0][key]
        weight = weights[key.partition("[")[0]].detach().double()
        rows = weight.reshape(len(forget), -1, forget.shape[-1])  # (G, O, D)

        project = partial(projected, rows, forget, retain)

        layers.append(
            {
                "weight": key,
                "shape": list(weight.shape),
                "groups": forget.shape[0],
                "size": forget.shape[-1],
                "gram_mib": forget.nbytes / MIB,
                "gram_ms": 1000 * min(run[key] for run in spent[1:]),
                "projection_ms": 1000 * seconds(project, 1),
            }
        )
    return {
        "model": name,
        "image": network.size,
        "batch": network.batch,
        "forward_ms": 1000 * plain,
        "gram_mib": sum(layer["gram_mib"] for layer in layers),
        "gram_ms": sum(layer["gram_ms"] for layer in layers),
        "projection_ms": sum(layer["projection_ms"] for layer in layers),
        "layers": layers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows.append(measured(name, options.repeats))
        for layer in rows[-1]["layers"]:
            print(
                "{weight:32} {groups} x {size:4}^2 {gram_mib:7.1f} MiB   Gram {gram_ms:7.1f} ms "
                "a batch   projection {projection_ms:8.1f} ms".format(**layer),
                flush=True,
            )
        print(
            "{model}: forward {forward_ms:.0f} ms a batch; Gram matrices {gram_ms:.0f} ms a batch, "
            "{gram_mib:.0f} MiB a set; projections {projection_ms:.0f} ms".format(**rows[-1]),
            flush=True,
        )
    if options.json:
        write(options.json, rows=rows)


if __name__ == "__main__":
    main()
