"""Fine-tuning with an l1 penalty whose weight decays linearly: sparsity first, accuracy after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deepclean_hooks.methods.additive import Additive
from deepclean_hooks.methods.settings import require_positive
from deepclean_hooks.methods.term import Term


@dataclass(frozen=True)
class L1Sparse(Additive):
    """Adds a_e ||theta||_1 over all parameters, a_e = a (1 - e / (E - E_0)), to your loss on D_r.

    e = 0 ... E - 1 are the epochs, the last E_0 (`epochs_without`) have no penalty. Jia, Liu, Ram,
    Yao, Liu, Liu, Sharma, Liu: "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023,
    section 4, with the linearly decaying weight of its Table 4. Their code does not hold the weight
    of the penalty; others use 1e-6 to 1e-4 with it, and `weight` (a) 5e-5 is from that range.

    `unlearn` knows how long it trains; around your loop say it: `epochs` (E), and
    `steps_per_epoch`, the optimizer steps of an epoch.
    """

    weight: float = 5e-5
    epochs_without: int = 0
    epochs: int | None = None
    steps_per_epoch: int | None = None
    name = "l1-sparse"

    def __post_init__(self) -> None:
        """Raises ValueError for a weight that is no positive number, a negative E_0, or a length
        below 1."""
        super().__post_init__()
        require_positive(weight=self.weight)
        if self.epochs_without < 0:
            raise ValueError(f"epochs_without must not be negative, got {self.epochs_without!r}")
        lengths = {"epochs": self.epochs, "steps_per_epoch": self.steps_per_epoch}
        require_positive(**{name: n for name, n in lengths.items() if n is not None})

    def scheduled(self, *, epochs: int, steps_per_epoch: int) -> L1Sparse:
        """With the length of the training, where none was given."""
        return dataclasses.replace(
            self,
            epochs=self.epochs or epochs,
            steps_per_epoch=self.steps_per_epoch or steps_per_epoch,
        )

    def require_plain_training(self) -> None:
        """Raises ValueError unless the length of the training is known."""
        if self.epochs is None or self.steps_per_epoch is None:
            raise ValueError(
                "L1Sparse lowers its weight to 0 over the training, and a loop does not say how "
                "long it trains; pass L1Sparse(epochs=..., steps_per_epoch=...)"
            )

    def weight_at(self, step: int) -> float:
        """a_e in the epoch of an optimizer step."""
        self.require_plain_training()
        assert self.epochs is not None and self.steps_per_epoch is not None
        with_penalty = self.epochs - self.epochs_without
        if with_penalty <= 0:
            return 0.0
        return self.weight * max(0.0, 1 - (step // self.steps_per_epoch) / with_penalty)

    def term(self) -> Term:
        """The gradient of the penalty."""
        return _Penalty(self)


class _Penalty(Term):
    draws = False

    def __init__(self, method: L1Sparse) -> None:
        self._method = method

    def adjust(self, stepped: Mapping[str, Tensor], step: int) -> None:
        """Adds the weight, with the sign of each entry."""
        weight = self._method.weight_at(step)
        for tensor in stepped.values() if weight else ():
            if tensor.requires_grad:
                slope = tensor.detach().sign().mul_(weight)
                tensor.grad = slope if tensor.grad is None else tensor.grad.add_(slope)
