"""Training on the forget set with random labels, beside the retain set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Selection
from deepclean_hooks.methods.training import Loader, Step, Training


@dataclass(frozen=True)
class RandomLabel(Method):
    """An epoch is all forget batches with labels drawn anew, the true one included, then D_r.

    As in the code of Fan et al., "SalUn", for CIFAR-10; SGD 0.013, momentum 0.9, weight decay 5e-4,
    batches of 256, 10 epochs there. Labels are drawn by `seed`; the loss is cross-entropy.
    """

    seed: int = 0
    name = "random label"
    measured_by = SamplesOnly()
    own_training = True

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """Forget batches, then retain batches."""
        return Drawn(loss_fn, self.seed)


@dataclass(frozen=True)
class Amnesiac(Method):
    """D_f, each sample with one wrong label for good, and D_r, in mixed order.

    The relabelling of Graves, Nagisetty, Ganesh: "Amnesiac Machine Learning", AAAI 2021 (their
    other proposal, to subtract stored updates, needs a log of the training), as the code of SSD and
    of bad teaching runs it: Adam 1e-4, 3 epochs, batches of 128 and 256. A sample's wrong label is
    drawn by its content and `seed`; the loss is cross-entropy.
    """

    seed: int = 0
    name = "amnesiac"
    measured_by = SamplesOnly()
    own_training = True

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """Forget and retain batches in one random order."""
        return _Wrong(loss_fn, self.seed)


class _Relabelled(Training):
    """Steps of one batch each, of either set; forget batches get other labels."""

    def __init__(self, loss_fn: LossFn, seed: int) -> None:
        super().__init__(loss_fn)
        self.seed = seed
        self.random = torch.Generator().manual_seed(seed)

    def length(self, forget: Loader, retain: Loader) -> int:
        """Every batch is a step."""
        return len(forget) + len(retain)

    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """The mean loss of a retain batch, cross-entropy with other labels of a forget batch."""
        if step.forget is None:
            return self.mean_loss(model, step.retain)
        logits, labels = losses.logits_and_labels(model, step.forget)
        return F.cross_entropy(logits, self.labels(step.forget, labels, logits.shape[1]))

    def labels(self, batch: Batch, labels: Tensor, classes: int) -> Tensor:
        """What the labels (N,) of a forget batch become."""
        raise NotImplementedError


class Drawn(_Relabelled):
    """Forget batches with labels drawn anew, then retain batches."""

    def pairs(
        self, forget: Loader, retain: Loader, epoch: int
    ) -> Iterator[tuple[Batch | None, Batch | None]]:
        """The forget set first."""
        for batch in forget:
            yield batch, None
        for batch in retain:
            yield None, batch

    def labels(self, batch: Batch, labels: Tensor, classes: int) -> Tensor:
        """Drawn uniformly."""
        return torch.randint(classes, labels.shape, generator=self.random).to(labels.device)


class _Wrong(_Relabelled):
    def pairs(
        self, forget: Loader, retain: Loader, epoch: int
    ) -> Iterator[tuple[Batch | None, Batch | None]]:
        """Batches of both sets, shuffled."""
        mixed = [True] * len(forget) + [False] * len(retain)
        gone, kept = iter(forget), iter(retain)
        for at in torch.randperm(len(mixed), generator=self.random).tolist():
            yield (next(gone), None) if mixed[at] else (None, next(kept))

    def labels(self, batch: Batch, labels: Tensor, classes: int) -> Tensor:
        """Never the true one, and the same in every epoch."""
        if classes < 2:
            raise ValueError(f"a wrong label needs two classes at least, the model has {classes}")
        ids = batches.sample_ids(batch)
        shift = [1 + (one + 0x9E3779B9 * self.seed) % (classes - 1) for one in ids]
        return (labels + torch.tensor(shift, device=labels.device)) % classes
