"""What an evaluation costs: its time over that of plain forward passes over the same images.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation [--images 60000] [--model resnet18]
    OMP_NUM_THREADS=1 python -m benchmarks.evaluation --data-dir DATA --checkpoint resnet20.th

Both are run in turn in one process with the same loaders; the ratio is the median over repeats,
with the smallest and the largest beside it. The images, random or those of CIFAR-10 (DATA as in
examples/forget_cifar10.py), are held in memory: a forward pass is all there is to a plain pass, so
that the ratio is the worst that data on a disk can show. 5/6 of them are training data, a tenth of
which is the forget set, and 1/6 test data, as in CIFAR-10.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.lab.data import images as read_images
from benchmarks.lab.models import resnet18, small_cnn
from benchmarks.lab.results import write
from benchmarks.lab.timer import Timer
from deepclean_hooks import evaluate
from examples.cifar10 import resnet20

Loaders = dict[str, DataLoader[tuple[torch.Tensor, ...]]]
MODELS = {"small": small_cnn, "resnet18": resnet18}


def drawn(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, 32, 32, generator=generator)
    return x, torch.randint(10, (images,), generator=generator)


def real(data_dir: Path, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The training images and, as the last sixth, the test images."""
    kept = images * 5 // 6
    data = read_images("cifar10", data_dir, train=kept, test=images - kept)
    parts = zip(data.train.tensors, data.test.tensors, strict=True)
    x, y = (torch.cat(pair) for pair in parts)
    return x, y


def loaders(x: torch.Tensor, y: torch.Tensor, batch_size: int) -> Loaders:
    images = len(x)
    cut = (images // 12, images * 5 // 6)
    parts = {"forget": slice(cut[0]), "retain": slice(*cut), "test": slice(cut[1], None)}
    return {
        name: DataLoader(TensorDataset(x[part], y[part]), batch_size=batch_size)
        for name, part in parts.items()
    }


def plain(model: nn.Module, sets: Loaders, device: torch.device) -> None:
    model.eval()
    with torch.no_grad():
        for loader in sets.values():
            for images, _ in loader:
                model(images.to(device)).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10 instead of random images")
    parser.add_argument("--checkpoint", type=Path, help="a trained ResNet-20 instead of --model")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = resnet20(given.checkpoint) if given.checkpoint else MODELS[given.model]()
    images = real(given.data_dir, given.images) if given.data_dir else drawn(given.images)
    model, sets = model.to(device), loaders(*images, given.batch_size)
    name = "resnet20" if given.checkpoint else given.model

    def scored() -> None:
        evaluate(model, **sets, probe=True, progress=False)

    warm = loaders(*(one[-600:] for one in images), given.batch_size)
    plain(model, warm, device)
    evaluate(model, **warm, probe=True, progress=False)
    seconds = Timer(device).seconds
    pairs = [
        (seconds(lambda: plain(model, sets, device)), seconds(scored)) for _ in range(given.repeats)
    ]
    ratios = [ours / theirs for theirs, ours in pairs]
    found = {
        "images": given.images,
        "data": "CIFAR-10" if given.data_dir else "random",
        "model": name,
        "batch_size": given.batch_size,
        "plain_seconds": statistics.median(theirs for theirs, _ in pairs),
        "evaluate_seconds": statistics.median(ours for _, ours in pairs),
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
    }
    print(
        f"{name}, {given.images} images: plain {found['plain_seconds']:.2f} s, evaluate "
        f"{found['evaluate_seconds']:.2f} s, ratio {found['ratio']:.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    if given.json:
        write(given.json, **found)


if __name__ == "__main__":
    main()
