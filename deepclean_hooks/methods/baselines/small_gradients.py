"""MSG: the convolution weights whose gradient is smallest are drawn anew, and all are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepclean_hooks.measure.batch_mean import MeanGradient
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Mask, Selection, Weights, largest
from deepclean_hooks.methods.settings import require_shares
from deepclean_hooks.methods.term import Original, Term


@dataclass(frozen=True)
class MSG(Method):
    """In each convolution the `share` of weights with the smallest |g|, g = d loss(D_r) - d
    loss(D_f), gets Kaiming-normal values (fan out); the other convolution weights then learn at
    `slow` of their gradient, everything else as usual.

    "Masked small gradients", an entry of the NeurIPS 2023 unlearning challenge, in Cadet,
    Borovykh, Malekzadeh, Ahmadi-Abhari, Haddadi: "Deep Unlearn", 2024, with their share and slow.
    Their g is of |D_f| random retain samples; here it is of all. Adam undoes a scaled gradient: use
    SGD.
    """

    share: float = 0.3
    slow: float = 0.1
    seed: int = 0
    name = "msg"
    effect = "drawn anew"
    measured_by = MeanGradient()

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
        self, weights: Weights, selection: Selection, forget: Measurement, retain: Measurement
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

    def term(self) -> Term:
        """Your loss, slowly for the convolution weights that were kept."""
        return _Slowed(self.slow)


class _Slowed(Term):
    draws = False

    def __init__(self, slow: float) -> None:
        self._slow = slow
        self._drawn_anew: dict[str, Tensor] = {}

    def prepare(self, original: Original) -> None:
        """The masks of the convolution weights."""
        self.load_state_dict({n: m for n, m in original.selection.masks.items() if m.dim() == 4})

    def adjust(self, stepped: Mapping[str, Tensor], step: int) -> None:
        """Scales the gradients of kept convolution weights."""
        for name, mask in self._drawn_anew.items():
            tensor = stepped.get(name)
            if tensor is not None and tensor.grad is not None:
                # The free entries of compact(), all of them, are a line.
                anew = mask.to(tensor.device).view(tensor.shape)
                tensor.grad.mul_(torch.where(anew, 1.0, self._slow))

    def state_dict(self) -> dict[str, Tensor]:
        """The masks."""
        return dict(self._drawn_anew)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The masks of the stored run."""
        self._drawn_anew = dict(state)
