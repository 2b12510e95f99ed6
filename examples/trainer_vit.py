"""Forget one class of CIFAR-10 in a small ViT that a Hugging Face Trainer trained.

    python examples/trainer_vit.py                         # handwritten digits: no download
    python examples/trainer_vit.py --data-dir DATA         # CIFAR-10
    torchrun --nproc-per-node 2 examples/trainer_vit.py    # two processes, or one for each GPU
    torchrun --nproc-per-node N examples/trainer_vit.py --data-dir DATA --bf16 --batch-size 128

DATA is where torchvision keeps CIFAR-10 (it is downloaded there if it is not), or a folder with a
module load.py. The Trainer uses the GPUs that there are; --cpu keeps it from that. The batch size
is one process's. The first half trains the network on everything; the second half is the same
Trainer on the retain set with one callback more. A run that was cut is taken up by --resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import deepclean_hooks as deepclean
from small_images import images, without_class


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="of CIFAR-10; without it: digits")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/trainer_vit"))
    parser.add_argument("--library", choices=["timm", "transformers"], default="timm")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--label", type=int, default=0, help="the class to forget (default: 0)")
    parser.add_argument("--gamma", type=float, default=2.0)
    parser.add_argument("--train-epochs", type=float, default=10)
    parser.add_argument("--epochs", type=float, default=3, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--limit", type=int, help="use this many training images only")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="take up the unlearning run")
    return parser.parse_args()


def network(options: argparse.Namespace, size: int) -> nn.Module:
    """A ViT for images of size x size, in 16 or 64 patches."""
    heads, patch = options.width // 32, size // 8 if size >= 32 else 2
    if options.library == "transformers":
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=options.width,
                num_hidden_layers=options.depth,
                num_attention_heads=heads,
                intermediate_size=4 * options.width,
                image_size=size,
                patch_size=patch,
                num_labels=10,
            )
        )
    return deepclean.ImageClassifier(
        timm.models.VisionTransformer(
            img_size=size,
            patch_size=patch,
            embed_dim=options.width,
            depth=options.depth,
            num_heads=heads,
            num_classes=10,
        )
    )


def trainer(
    options: argparse.Namespace,
    model: nn.Module,
    data: TensorDataset,
    epochs: float,
    name: str,
    callback: deepclean.DeepCleanCallback | None = None,
) -> Trainer:
    """An ordinary Trainer; the callback is all that unlearning adds."""
    settings = TrainingArguments(
        output_dir=str(options.output_dir / name),
        num_train_epochs=epochs,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=256,
        weight_decay=0.05,
        bf16=options.bf16,
        use_cpu=options.cpu,
        seed=options.seed,
        save_strategy="no" if callback is None else "epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        report_to=[],
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=model,
        args=settings,
        train_dataset=data,
        data_collator=deepclean.ImageClassifier.collate,
        callbacks=None if callback is None else [callback],
    )


def main() -> None:
    options = arguments()
    set_seed(options.seed)
    train, test = images(options.data_dir, options.limit)
    model = network(options, train.tensors[0].shape[-1])
    original = options.output_dir / "original.pt"
    if options.resume:
        model.load_state_dict(torch.load(original, map_location="cpu", weights_only=True))
    else:
        first = trainer(options, model, train, options.train_epochs, "original")
        first.train()
        if first.is_world_process_zero():
            torch.save(model.state_dict(), original)
    forget, retain = without_class(train, options.label)
    callback = deepclean.DeepCleanCallback(
        forget, method=deepclean.DeepClean(gamma=options.gamma), test=test
    )
    second = trainer(options, model, retain, options.epochs, "unlearned", callback)
    second.train(resume_from_checkpoint=True if options.resume else None)
    if second.is_world_process_zero():
        print(callback.report)


if __name__ == "__main__":
    main()
