"""Random crops and mirror images of a batch that lies in memory, drawn by a generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cropped(images: Tensor, margin: int, flip: bool, generator: torch.Generator) -> Tensor:
    """The batch (N, C, S, S), each image shifted by up to `margin` pixels, zeros coming in, and
    mirrored half of the time if `flip`."""
    count, _, size, _ = images.shape
    shift = torch.randint(0, 2 * margin + 1, (2, count, 1), generator=generator)  # (2, N, 1)
    mirrored = torch.rand(count, 1, generator=generator) < (0.5 if flip else 0.0)  # (N, 1)
    along = torch.arange(size)
    rows = (shift[0] + along).to(images.device)  # (N, S)
    columns = (shift[1] + torch.where(mirrored, size - 1 - along, along)).to(images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    padded = F.pad(images, (margin,) * 4)
    # Indices on both sides of a slice put the channels last: (N, S, S, C).
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
