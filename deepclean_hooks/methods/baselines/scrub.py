"""SCRUB: away from the original model on the forget set, towards it on the retain set, in turn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Selection
from deepclean_hooks.methods.settings import require_positive
from deepclean_hooks.methods.teachers import divergence, frozen, softened
from deepclean_hooks.methods.training import Loader, Step, Training, in_turn


@dataclass(frozen=True)
class SCRUB(Method):
    """Each of the first `forget_epochs` epochs first maximises KL(original || model) on D_f; every
    epoch minimises gamma loss + alpha KL(original || model) on D_r.

    Kurmanji, Triantafillou, Hayes, Triantafillou: "Towards Unbounded Machine Unlearning", NeurIPS
    2023, algorithm 1. KL is of outputs softened by `temperature` T, times T^2. The defaults are
    their code's (3 forget epochs for some tasks). Rewinding to an earlier checkpoint is not done.
    The two halves alternate, so that only `unlearn` can train so.
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

    def steps(self, forget: Loader, retain: Loader, epoch: int) -> Iterator[Step]:
        """Forget batches in the first epochs, then retain batches."""
        return in_turn(forget if epoch < self.method.forget_epochs else (), retain, epoch)

    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """Minus the divergence of a forget batch; loss and divergence of a retain batch."""
        method, temperature = self.method, self.method.temperature
        target = softened(self.teacher, step.batch, temperature)
        away = divergence(model, target, step.batch, temperature).mean() * temperature**2
        if step.of_forget:
            return -away
        return method.gamma * self.mean_loss(model, step.batch) + method.alpha * away
