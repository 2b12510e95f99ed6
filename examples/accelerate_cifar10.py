"""Forget one class of CIFAR-10 in a ResNet-20 whose training loop runs on Accelerate.

    python examples/accelerate_cifar10.py                                   # handwritten digits
    python examples/accelerate_cifar10.py --data-dir DATA --checkpoint resnet20.th
    torchrun --nproc-per-node 2 examples/accelerate_cifar10.py --cpu        # two processes
    accelerate launch --multi_gpu --num_processes N examples/accelerate_cifar10.py --data-dir DATA

On CPUs launch with torchrun: `accelerate launch --cpu --num_processes 2` starts one process. DATA
is where torchvision keeps CIFAR-10 (it is downloaded there if it is not), or a folder with a module
load.py; the checkpoint is a state dict of ResNet-20, and without one a network is trained first.
With --state a run stores itself after each epoch, and with --resume as well it goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset

import deepclean_hooks as deepclean
from cifar10 import ResNet, resnet20
from small_images import images, without_class


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="of CIFAR-10; without it: digits")
    parser.add_argument("--checkpoint", type=Path, help="weights of a trained ResNet-20")
    parser.add_argument("--depth", type=int, default=20, help="6 n + 2 (default: 20)")
    parser.add_argument("--label", type=int, default=0, help="the class to forget (default: 0)")
    parser.add_argument("--gamma", type=float, default=2.0)
    parser.add_argument("--train-epochs", type=int, default=10, help="without a checkpoint")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128, help="of each process")
    parser.add_argument("--limit", type=int, help="use this many training images only")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="store the run in this folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --state")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    return parser.parse_args()


def loader(data: Dataset[Any], options: argparse.Namespace) -> DataLoader[Any]:
    return DataLoader(data, batch_size=options.batch_size, shuffle=True)


def epoch(accelerator: Accelerator, model: nn.Module, optimizer: Any, batches: Any) -> None:
    """One pass of an ordinary loop; nothing in here knows of unlearning."""
    model.train()
    for x, y in batches:
        accelerator.backward(F.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    options = arguments()
    accelerator = Accelerator(cpu=options.cpu, mixed_precision=options.precision)
    set_seed(options.seed)
    train, test = images(options.data_dir, options.limit)
    forget, retain = without_class(train, options.label)
    model = ResNet(options.depth) if options.checkpoint is None else resnet20(options.checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=5e-4)
    model, optimizer, everything, retained = accelerator.prepare(
        model, optimizer, loader(train, options), loader(retain, options)
    )
    hook = deepclean.DeepCleanHook(
        accelerator,
        model,
        forget=forget,
        retain=retained,
        method=deepclean.DeepClean(gamma=options.gamma),
        test=test,
        batch_size=256,
    )
    first = 0
    if options.resume:
        done = max(options.state.glob("epoch-*"), key=lambda path: int(path.name[6:]))
        accelerator.load_state(str(done))
        first = int(done.name[6:])
    elif options.checkpoint is None:
        for _ in range(options.train_epochs):
            epoch(accelerator, model, optimizer, everything)
    with hook as run:
        for number in range(first, options.epochs):
            epoch(accelerator, model, optimizer, retained)
            if options.state is not None:
                accelerator.save_state(str(options.state / f"epoch-{number + 1}"))
    accelerator.print(run.report)
    if options.json is not None and accelerator.is_main_process:
        options.json.write_text(run.report.to_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
