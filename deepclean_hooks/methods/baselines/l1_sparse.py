"""Fine-tuning with an l1 penalty whose weight decays linearly: sparsity first, accuracy after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Selection
from deepclean_hooks.methods.settings import require_positive
from deepclean_hooks.methods.training import RetainOnly, Step, Training


@dataclass(frozen=True)
class L1Sparse(Method):
    """Minimises loss(D_r) + a_e ||theta||_1 over all parameters, a_e = a (1 - e / (E - E_0)).

    e = 0 ... E - 1 are the epochs, the last E_0 (`epochs_without`) have no penalty. Jia, Liu, Ram,
    Yao, Liu, Liu, Sharma, Liu: "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023,
    section 4, with the linearly decaying weight of its Table 4. The authors train by SGD 0.01,
    momentum 0.9, weight decay 5e-4, batches of 256, 10 epochs. Their code does not hold the weight
    of the penalty; others use 1e-6 to 1e-4 with it, and `weight` 5e-5 is from that range.
    """

    weight: float = 5e-5
    epochs_without: int = 0
    name = "l1-sparse"
    measured_by = SamplesOnly()
    own_training = True

    def __post_init__(self) -> None:
        """Raises ValueError for a weight that is no positive number or a negative E_0."""
        require_positive(weight=self.weight)
        if self.epochs_without < 0:
            raise ValueError(f"epochs_without must not be negative, got {self.epochs_without!r}")

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """The penalised loss on retain batches."""
        return _Penalised(loss_fn, self)


class _Penalised(RetainOnly):
    def __init__(self, loss_fn: LossFn, method: L1Sparse) -> None:
        super().__init__(loss_fn)
        self.method = method

    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """The mean loss plus the penalty."""
        with_penalty = step.epochs - self.method.epochs_without
        weight = self.method.weight * (1 - step.epoch / with_penalty) if with_penalty > 0 else 0.0
        length = torch.stack([p.abs().sum() for p in model.parameters() if p.requires_grad]).sum()
        return self.mean_loss(model, step.retain) + max(weight, 0.0) * length
