"""What the exact Fisher diagonal costs: its time over that of a plain forward and backward of the
same batches.

    OMP_NUM_THREADS=1 python benchmarks/fisher.py [--models resnet18 ...] [--json FILE]
    OMP_NUM_THREADS=1 python benchmarks/fisher.py --peers [--json FILE]

Both are run in turn in one process on the same batches with the same threads; the ratio is the
median over repeats, with the smallest and the largest beside it. "first" includes what happens once
for a model: probing, planning and the self-check against the one-sample loop. `--peers` puts other
libraries' ways beside ours (see peers.py) on one batch each; `--cpu-time` counts the processor
seconds of the one thread, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks import measure
from deepclean_hooks.losses import cross_entropy
from deepclean_hooks.persample.engine import SquaredGradients
from deepclean_hooks.persample.loop import squared_gradients
from peers import compared
from result_file import write

Batches = list[tuple[Tensor, Tensor]]


def resnet18() -> nn.Module:
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def vgg16_cifar() -> nn.Module:
    import torchvision

    model = torchvision.models.vgg16_bn(num_classes=10)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return model


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10)

    return build


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return build


def plain_cnn() -> nn.Module:
    """Convolutions and linear layers alone, which every library serves."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10))


# name: (how to build it, image size, batch size)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (resnet18, 32, 32),
    "vgg16_bn (CIFAR head)": (vgg16_cifar, 32, 32),
    "vgg16_bn (134M)": (torchvision_model("vgg16_bn"), 32, 16),
    "resnet50": (torchvision_model("resnet50"), 64, 32),
    "vit_tiny": (timm_model("vit_tiny_patch16_224", img_size=96), 96, 32),
    "convnext_atto": (timm_model("convnext_atto"), 96, 32),
    "swin_tiny": (timm_model("swin_tiny_patch4_window7_224", img_size=112), 112, 32),
    "mobilenetv3_small": (timm_model("mobilenetv3_small_100"), 96, 32),
}
BESIDE_PEERS = {"plain CNN": (plain_cnn, 32, 32), **MODELS}


clock = time.perf_counter


def timed(work: Callable[[], object]) -> float:
    start = clock()
    work()
    return clock() - start


def plain(model: nn.Module, batches: Batches) -> None:
    """Forward and backward of each batch, gradients dropped in between: what an epoch costs without
    its steps."""
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=True)


def exact(engine: SquaredGradients, batches: Batches) -> None:
    for batch in batches:
        engine.add(batch)
    engine.totals()


def one_at_a_time(model: nn.Module, parameters: dict[str, nn.Parameter], batches: Batches) -> None:
    for batch in batches:
        squared_gradients(model, parameters, cross_entropy, batch)


def row(name: str, count: int, repeats: int, loop: bool) -> dict[str, Any]:
    build, size, batch_size = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    batches = [
        (torch.randn(batch_size, 3, size, size), torch.randint(0, 10, (batch_size,)))
        for _ in range(count)
    ]
    ratios, seconds = [], []
    with measure.no_trace(model):
        parameters = dict(model.named_parameters())
        first = timed(lambda: exact(SquaredGradients(model, parameters), batches))
        engine = SquaredGradients(model, parameters)
        engine.plan_for(batches[0])
        plain(model, batches[:2])
        for _ in range(repeats):
            # Half of the plain passes before and half after, so that drift of the machine cancels.
            before = timed(lambda: plain(model, batches))
            ours = timed(lambda: exact(engine, batches))
            after = timed(lambda: plain(model, batches))
            seconds.append((before + after) / 2)
            ratios.append(ours / seconds[-1])
        base = statistics.median(seconds)
        result = {
            "model": name,
            "image": size,
            "batch": batch_size,
            "entries": sum(p.numel() for p in parameters.values()),
            "plain_ms_per_batch": 1000 * base / count,
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "ratio_first": first / base,
            "one_sample_loop_parameters": len(engine.notes),
        }
        if loop:
            few = batches[:1]
            base_few = timed(lambda: plain(model, few))
            result["ratio_of_one_sample_loop"] = (
                timed(lambda: one_at_a_time(model, parameters, few)) / base_few
            )
    return result


def beside_peers(name: str, most: int) -> dict[str, Any]:
    """Our seconds for a batch of at most `most` samples, the plain pass's and the others'."""
    build, size, batch_size = BESIDE_PEERS[name]
    torch.manual_seed(0)
    model = build().eval()
    n = min(most, batch_size)
    batch = (torch.randn(n, 3, size, size), torch.randint(0, 10, (n,)))
    with measure.no_trace(model):
        engine = SquaredGradients(model, dict(model.named_parameters()))
        engine.plan_for(batch)
        plain(model, [batch])
        base = min(timed(lambda: plain(model, [batch])) for _ in range(2))
        ours = min(timed(lambda: exact(engine, [batch])) for _ in range(2))
    rows = compared(model, batch, timed)
    for found in rows.values():
        found["ratio"] = None if found["seconds"] is None else found["seconds"] / base
    return {"model": name, "samples": n, "plain_seconds": base, "ratio": ours / base, "peers": rows}


def peers(options: argparse.Namespace) -> None:
    rows = []
    for name in options.models or BESIDE_PEERS:
        rows.append(beside_peers(name, options.samples))
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            write(options.json, clock=clock.__name__, rows=rows)


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loop", action="store_true", help="time the one-sample loop too")
    parser.add_argument("--peers", action="store_true", help="other libraries, one batch each")
    parser.add_argument("--samples", type=int, default=8, help="of the batch that peers are given")
    parser.add_argument("--cpu-time", action="store_true", help="processor instead of wall time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        clock = time.process_time
    if options.peers:
        peers(options)
        return
    rows = []
    for name in options.models or MODELS:
        rows.append(row(name, options.batches, options.repeats, options.loop))
        print(
            "{model:24} {plain_ms_per_batch:8.0f} ms   ratio {ratio:.2f} "
            "[{ratio_min:.2f}, {ratio_max:.2f}]   "
            "first {ratio_first:.2f}".format(**rows[-1]),
            flush=True,
        )
    mean = statistics.geometric_mean(r["ratio"] for r in rows)
    print(f"geometric mean {mean:.3f}")
    if options.json:
        write(
            options.json,
            batches=options.batches,
            repeats=options.repeats,
            clock=clock.__name__,
            geometric_mean=mean,
            rows=rows,
        )


if __name__ == "__main__":
    main()
