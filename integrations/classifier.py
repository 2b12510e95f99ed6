"""A timm, torchvision or other plain image classifier in the form that a Trainer expects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """`model(pixel_values)` as a model that takes and returns what a Trainer's models do.

    Trainer(model=ImageClassifier(timm.create_model("resnet18")), data_collator=
    ImageClassifier.collate, ...). The network is the attribute `model`, the very one passed in.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """{"logits": (N, C)}, and before it, where there are labels (N,), their mean "loss"."""
        logits: Tensor = self.model(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}

    @staticmethod
    def collate(samples: Sequence[tuple[Tensor, int | Tensor]]) -> dict[str, Tensor]:
        """A batch of (image, label) samples, as data sets of torchvision have them."""
        return {
            "pixel_values": torch.stack([image for image, _ in samples]),
            "labels": torch.tensor([int(label) for _, label in samples]),
        }
