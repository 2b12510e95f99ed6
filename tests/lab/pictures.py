"""A folder of small PNG files by class, and a network of timm for them, as a user of the command
line has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("ant", "bee", "cat")
MODEL = "timm:test_resnet"
SIZE = 32
COMMON = ["--size", str(SIZE), "--batch-size", "8"]


def write(folder: Path, each: int = 8, seed: int = 0) -> Path:
    """`each` PNGs a class, named 00.png and so on: noise around a colour of the class."""
    drawn = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = drawn.integers(0, 128, (SIZE, SIZE, 3), dtype=np.uint8)
            pixels[..., label] += 96
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def weights(seed: int = 0, classes: int = len(CLASSES)) -> dict[str, torch.Tensor]:
    """A state_dict of the network; not trained, which no command asks."""
    import timm

    torch.manual_seed(seed)
    state: dict[str, torch.Tensor] = timm.create_model(
        MODEL.partition(":")[2], num_classes=classes
    ).state_dict()
    return state


def case(folder: Path) -> list[str]:
    """A folder with pictures, weights nested as timm's scripts do, and a list of two; the options
    that name them."""
    write(folder / "train")
    nested = {f"module.{name}": value for name, value in weights().items()}
    torch.save({"epoch": 3, "state_dict": nested, "optimizer": {}}, folder / "net.pth.tar")
    (folder / "delete.txt").write_text("ant/03.png\n\nbee/05.png\n", encoding="utf-8")
    given = {"model": MODEL, "weights": folder / "net.pth.tar", "data": folder / "train"}
    given["forget"] = folder / "delete.txt"
    return [*COMMON, *(part for name, v in given.items() for part in (f"--{name}", str(v)))]
