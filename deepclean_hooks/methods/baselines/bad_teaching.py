"""Bad teaching: on the forget set the model learns from an untrained teacher, elsewhere from itself
as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Selection
from deepclean_hooks.methods.settings import require_positive, require_shares
from deepclean_hooks.methods.teachers import divergence, fresh, frozen
from deepclean_hooks.methods.training import Loader, Step, Training


@dataclass(frozen=True)
class BadTeaching(Method):
    """Minimises KL(teacher || model) at a temperature: the teacher is an untrained network on D_f,
    the original on `share` of the retain batches, drawn anew in each epoch.

    Chundawat, Tarun, Mandal, Kankanhalli: "Can Bad Teaching Induce Forgetting?", AAAI 2023,
    equation 4; share 0.3, temperature 1, Adam 1e-4, 1 epoch, batches of 256 in their notebook
    (DeepClean's table: 1e-3, 10 epochs, ten times both, which explains its low retain accuracy).
    The divergence is averaged over samples; their code divides by the classes too, which the
    learning rate then has to make up for. `build` makes the untrained network, as in Retrain.
    """

    share: float = 0.3
    temperature: float = 1.0
    build: Callable[[], nn.Module] | None = None
    seed: int = 0
    name = "bad teaching"
    measured_by = SamplesOnly()
    own_training = True

    def __post_init__(self) -> None:
        """Raises ValueError unless share is above 0 and at most 1, and temperature is positive."""
        require_positive(temperature=self.temperature)
        require_shares(share=self.share)

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """With copies of the model as teachers."""
        bad = fresh(model, seed=self.seed, build=self.build)
        return _Taught(loss_fn, self, frozen(copy.deepcopy(model)), frozen(bad))


class _Taught(Training):
    def __init__(
        self, loss_fn: LossFn, method: BadTeaching, good: nn.Module, bad: nn.Module
    ) -> None:
        super().__init__(loss_fn)
        self.method, self.good, self.bad = method, good, bad
        self.random = torch.Generator().manual_seed(method.seed)

    def _kept(self, retain: Loader) -> int:
        return max(1, round(self.method.share * len(retain)))

    def length(self, forget: Loader, retain: Loader) -> int:
        """Every forget batch and the share of retain batches."""
        return len(forget) + self._kept(retain)

    def pairs(
        self, forget: Loader, retain: Loader, epoch: int
    ) -> Iterator[tuple[Batch | None, Batch | None]]:
        """Batches of both sets, in random order; the loader's first retain batches."""
        count = self._kept(retain)
        gone, kept = iter(forget), iter(retain)
        for at in torch.randperm(len(forget) + count, generator=self.random).tolist():
            yield (next(gone), None) if at < len(forget) else (None, next(kept))

    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """KL from the teacher that the batch's set has."""
        batch, teacher = (
            (step.retain, self.good) if step.forget is None else (step.forget, self.bad)
        )
        return divergence(model, teacher, batch, self.method.temperature)
