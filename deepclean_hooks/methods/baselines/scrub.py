"""SCRUB: away from the original model on the forget set, towards it on the retain set, in turn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Selection
from deepclean_hooks.methods.settings import require_positive
from deepclean_hooks.methods.teachers import divergence, frozen
from deepclean_hooks.methods.training import Loader, Step, Training


@dataclass(frozen=True)
class SCRUB(Method):
    """Each of the first `forget_epochs` epochs first maximises KL(original || model) on D_f; every
    epoch minimises gamma loss + alpha KL(original || model) on D_r.

    Kurmanji, Triantafillou, Hayes, Triantafillou: "Towards Unbounded Machine Unlearning", NeurIPS
    2023, algorithm 1. KL is of outputs softened by `temperature` T, times T^2. gamma 0.99, alpha
    0.001, T 4, 2 forget epochs (3 for some tasks), SGD 5e-4, weight decay 5e-4, divided by 10
    after 3, 5 and 9 epochs, 5 to 10 epochs in their code. Rewinding to an earlier checkpoint is
    not done.
    """

    alpha: float = 0.001
    gamma: float = 0.99
    temperature: float = 4.0
    forget_epochs: int = 2
    name = "scrub"
    measured_by = SamplesOnly()
    own_training = True

    def __post_init__(self) -> None:
        """Raises ValueError for a hyper-parameter that is no positive number."""
        require_positive(alpha=self.alpha, gamma=self.gamma, temperature=self.temperature)
        if self.forget_epochs < 1:
            raise ValueError(f"forget_epochs must be 1 at least, got {self.forget_epochs!r}")

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """With a copy of the model as teacher."""
        return _Alternating(loss_fn, self, frozen(copy.deepcopy(model)))


class _Alternating(Training):
    def __init__(self, loss_fn: LossFn, method: SCRUB, teacher: nn.Module) -> None:
        super().__init__(loss_fn)
        self.method, self.teacher = method, teacher

    def length(self, forget: Loader, retain: Loader) -> int:
        """Of an epoch with forget batches, the longest."""
        return len(forget) + len(retain)

    def pairs(
        self, forget: Loader, retain: Loader, epoch: int
    ) -> Iterator[tuple[Batch | None, Batch | None]]:
        """Forget batches in the first epochs, then retain batches."""
        for batch in forget if epoch < self.method.forget_epochs else ():
            yield batch, None
        for batch in retain:
            yield None, batch

    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """Minus the divergence of a forget batch; loss and divergence of a retain batch."""
        method = self.method
        batch = step.retain if step.forget is None else step.forget
        away = divergence(model, self.teacher, batch, method.temperature) * method.temperature**2
        if step.forget is not None:
            return -away
        return method.gamma * self.mean_loss(model, batch) + method.alpha * away
