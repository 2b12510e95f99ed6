"""What the exact Fisher diagonal costs: its time over that of a plain forward and backward of the
same batches.

    OMP_NUM_THREADS=1 python benchmarks/fisher.py [--models resnet18 ...] [--json FILE]
    OMP_NUM_THREADS=1 python benchmarks/fisher.py --peers [--json FILE]
    python benchmarks/fisher.py --device cuda [--tf32] [--peers] [--json FILE]

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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks.data.losses import cross_entropy
from deepclean_hooks.model import no_trace
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
ON_GPU = {
    "resnet18": (resnet18, 32, 512),
    "resnet50": (torchvision_model("resnet50"), 224, 64),
    "vit_base": (timm_model("vit_base_patch16_224"), 224, 64),
    "convnext_tiny": (timm_model("convnext_tiny"), 224, 64),
}
MIB = 2**20

clock = time.perf_counter
device = torch.device("cpu")
tf32 = False


def timed(work: Callable[[], object]) -> float:
    """Seconds until the device has done the work."""
    settle()
    start = clock()
    work()
    settle()
    return clock() - start


def settle() -> None:
    """Waits for the device."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def made(
    models: dict[str, tuple[Callable[[], nn.Module], int, int]], name: str, count: int, most: int
) -> tuple[nn.Module, Batches, int]:
    """A model of a table in eval mode, `count` batches of at most `most` samples, the image size.

    Both on the device.
    """
    build, size, batch_size = models[name]
    torch.manual_seed(0)
    model = build().eval().to(device)
    n = min(most, batch_size)
    batches = [
        (torch.randn(n, 3, size, size).to(device), torch.randint(0, 10, (n,)).to(device))
        for _ in range(count)
    ]
    return model, batches, size


@contextlib.contextmanager
def as_measured(model: nn.Module) -> Iterator[None]:
    """As `fisher_diagonal` runs a model, TF32 on all the same if that was asked for."""
    with no_trace.no_trace(model):
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        yield


def peak_mib(work: Callable[[], object]) -> float | None:
    """What the work allocates on a GPU above what is there; None on a CPU, which memory.py
    measures."""
    if device.type != "cuda":
        return None
    settle()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    settle()
    return (torch.cuda.max_memory_allocated() - before) / MIB


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
    models = MODELS if device.type == "cpu" else ON_GPU
    model, batches, size = made(models, name, count, models[name][2])
    ratios, seconds = [], []
    with as_measured(model):
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
            "batch": len(batches[0][1]),
            "entries": sum(p.numel() for p in parameters.values()),
            "plain_ms_per_batch": 1000 * base / count,
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "ratio_first": first / base,
            "one_sample_loop_parameters": len(engine.notes),
        }
        if device.type == "cuda":
            few = batches[:2]
            result["plain_mib"] = peak_mib(lambda: plain(model, few))
            result["exact_mib"] = peak_mib(lambda: exact(SquaredGradients(model, parameters), few))
            result["result_mib"] = 8 * result["entries"] / MIB
        if loop:
            few = batches[:1]
            base_few = timed(lambda: plain(model, few))
            result["ratio_of_one_sample_loop"] = (
                timed(lambda: one_at_a_time(model, parameters, few)) / base_few
            )
    return result


def beside_peers(name: str, most: int) -> dict[str, Any]:
    """Our seconds for a batch of at most `most` samples, the plain pass's and the others'."""
    models = BESIDE_PEERS if device.type == "cpu" else ON_GPU
    model, (batch,), _ = made(models, name, 1, most)
    n = len(batch[1])
    with as_measured(model):
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
    for name in options.models or (BESIDE_PEERS if device.type == "cpu" else ON_GPU):
        rows.append(beside_peers(name, options.samples))
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            write(options.json, clock=clock.__name__, tf32=tf32, rows=rows)


def main() -> None:
    global clock, device, tf32
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loop", action="store_true", help="time the one-sample loop too")
    parser.add_argument("--peers", action="store_true", help="other libraries, one batch each")
    parser.add_argument("--samples", type=int, default=8, help="of the batch that peers are given")
    parser.add_argument("--cpu-time", action="store_true", help="processor instead of wall time")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--tf32", action="store_true", help="round products of both ways to TF32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, tf32 = options.device, options.tf32
    if options.cpu_time:
        clock = time.process_time
    if options.peers:
        peers(options)
        return
    rows = []
    for name in options.models or (MODELS if device.type == "cpu" else ON_GPU):
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
            tf32=tf32,
            geometric_mean=mean,
            rows=rows,
        )


if __name__ == "__main__":
    main()
