"""MSG: the convolution weights whose gradient is smallest are drawn anew, and all are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.measure.batch_mean import MeanGradient
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Mask, Selection, largest
from deepclean_hooks.methods.settings import require_shares
from deepclean_hooks.methods.training import RetainOnly, Training


@dataclass(frozen=True)
class MSG(Method):
    """In each convolution the `share` of weights with the smallest |g|, g = d loss(D_r) - d
    loss(D_f), gets Kaiming-normal values (fan out); the other convolution weights then learn at
    `slow` of their gradient, everything else as usual.

    "Masked small gradients", an entry of the NeurIPS 2023 unlearning challenge, in Cadet,
    Borovykh, Malekzadeh, Ahmadi-Abhari, Haddadi: "Deep Unlearn", 2024. share 0.3, slow 0.1, SGD
    1e-3, momentum 0.9, weight decay 5e-4, batches of 64, 5 epochs there, the learning rate raised
    over half of them and lowered after. Their g is of |D_f| random retain samples; here it is of
    all. Adam undoes a scaled gradient: use `optimizer=partial(torch.optim.SGD, ...)`.
    """

    share: float = 0.3
    slow: float = 0.1
    seed: int = 0
    name = "msg"
    effect = "drawn anew"
    measured_by = MeanGradient()
    own_training = True

    def __post_init__(self) -> None:
        """Raises ValueError unless share is above 0 and at most 1, and slow is 0 to 1."""
        require_shares(share=self.share)
        if not 0 <= self.slow <= 1:
            raise ValueError(f"slow must be 0 to 1, got {self.slow!r}")

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """The convolution weights (4-D) with the smallest gradients, layer by layer."""
        kept, gone = retain.mean(), forget.mean()
        masks: Mask = {}
        for name, gradient in kept.items():
            masks[name] = torch.zeros(gradient.shape, dtype=torch.bool, device=gradient.device)
            if gradient.dim() == 4:
                small = -(gradient - gone[name]).abs()
                masks[name] = largest({name: small}, self.share)[name]
        total = sum(mask.numel() for mask in masks.values() if mask.dim() == 4)
        return Selection(masks, total, f"|g| is among its layer's smallest {self.share:.0%}")

    def new_values(
        self,
        weights: Mapping[str, Tensor],
        selection: Selection,
        forget: Measurement,
        retain: Measurement,
    ) -> dict[str, Tensor]:
        """Kaiming-normal values, drawn by the seed."""
        random = torch.Generator().manual_seed(self.seed)
        values = {}
        for name, mask in selection.masks.items():
            values[name] = weights[name]
            if mask.dim() == 4:
                drawn = torch.empty(mask.shape, dtype=weights[name].dtype)
                nn.init.kaiming_normal_(drawn, mode="fan_out", generator=random)
                values[name] = drawn.to(mask.device)
        return values

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """The plain loss, slowly for the convolution weights that were kept."""
        return _Slowed(loss_fn, selection.masks, self.slow)


class _Slowed(RetainOnly):
    def __init__(self, loss_fn: LossFn, masks: Mask, slow: float) -> None:
        super().__init__(loss_fn)
        self.masks, self.slow = masks, slow

    def adjust(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Scales the gradients of kept convolution weights."""
        for name, p in parameters.items():
            if p.grad is not None and p.dim() == 4 and name in self.masks:
                p.grad.mul_(torch.where(self.masks[name], 1.0, self.slow))
