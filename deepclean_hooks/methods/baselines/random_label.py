"""Training on the forget set with wrong or random labels, beside the retain set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.methods.additive import Additive
from deepclean_hooks.methods.selecting import Selection
from deepclean_hooks.methods.settings import require_positive
from deepclean_hooks.methods.term import Drawn, Original, Term
from deepclean_hooks.methods.training import Loader, Step, Training, in_turn


@dataclass(frozen=True)
class _OtherLabels(Additive):
    """A weighted term on D_f with changed labels, or the published training."""

    _: KW_ONLY
    weight: float | None = None
    as_published: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a weight that is no positive number."""
        super().__post_init__()
        if self.weight is not None:
            require_positive(weight=self.weight)

    @property
    def own_training(self) -> bool:
        """Whether the published order was asked for."""
        return self.as_published


@dataclass(frozen=True)
class RandomLabel(_OtherLabels):
    """Adds `weight` times the cross-entropy of D_f with labels drawn anew at every step, the true
    one included.

    Equation 5 of Fan et al., "SalUn", ICLR 2024, without its mask. `weight` is |D_f| / |D_r| by
    default: a sample of D_f then counts as much as one of D_r. `as_published`: an epoch is all
    forget batches, then D_r, as in their code for CIFAR-10; only `unlearn` can train so.
    """

    name = "random label"

    def term(self) -> Term | None:
        """Cross-entropy with random labels."""
        return None if self.as_published else DrawnLabels(self.weight, self.seed)

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """Forget batches, then retain batches."""
        return InTurn(loss_fn, self.seed)


@dataclass(frozen=True)
class Amnesiac(_OtherLabels):
    """Adds `weight` times the cross-entropy of D_f, each sample with one wrong label for good.

    The relabelling of Graves, Nagisetty, Ganesh: "Amnesiac Machine Learning", AAAI 2021 (their
    other proposal, to subtract stored updates, needs a log of the training). A sample's wrong label
    is drawn by its content and `seed`. `weight` is |D_f| / |D_r| by default: a sample of D_f then
    counts as much as one of D_r. `as_published`: batches of either set in one random order, as the
    code of SSD and of bad teaching has it; only `unlearn` can train so.
    """

    name = "amnesiac"

    def term(self) -> Term | None:
        """Cross-entropy with wrong labels."""
        return None if self.as_published else _WrongLabels(self.weight, self.seed)

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """Forget and retain batches in one random order."""
        return _Mixed(loss_fn, self.seed)


class _Relabelled(Term):
    """The weighted cross-entropy of forget batches with changed labels."""

    def __init__(self, weight: float | None, seed: int) -> None:
        self._weight, self.seed = weight, seed

    def prepare(self, original: Original) -> None:
        """Weighs the term by the sizes of the sets, if no weight was given."""
        if self._weight is None:
            self._weight = original.forget_count / original.retain_count

    def losses(self, model: nn.Module, loss_fn: LossFn, drawn: Drawn) -> Tensor:
        """The weighted cross-entropy of each sample."""
        assert self._weight is not None  # prepare() or a stored run set it
        logits, labels = losses.logits_and_labels(model, drawn.batch)
        changed = self.labels(drawn, labels, logits.shape[1])
        return self._weight * F.cross_entropy(logits, changed, reduction="none")

    def labels(self, drawn: Drawn, labels: Tensor, classes: int) -> Tensor:
        """What the labels (N,) of a forget batch become."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """The weight."""
        return {"weight": torch.tensor(self._weight, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The stored run's weight."""
        self._weight = float(state["weight"])


class DrawnLabels(_Relabelled):
    """Labels drawn uniformly, by the seed and the step."""

    def labels(self, drawn: Drawn, labels: Tensor, classes: int) -> Tensor:
        """The same on any number of ranks: drawn for the whole batch."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + drawn.step)
        whole = torch.randint(classes, drawn.whole.shape, generator=random)  # (B,)
        return whole[drawn.mine].to(labels.device)


class _WrongLabels(_Relabelled):
    def labels(self, drawn: Drawn, labels: Tensor, classes: int) -> Tensor:
        """Never the true one, and the same at every step."""
        return wrong_labels(drawn.batch, labels, classes, self.seed)


def wrong_labels(batch: Batch, labels: Tensor, classes: int, seed: int) -> Tensor:
    """For each sample a label that is not its label, (N,), drawn by its content and the seed."""
    if classes < 2:
        raise ValueError(f"a wrong label needs two classes at least, the model has {classes}")
    shifts = [1 + (i + 0x9E3779B9 * seed) % (classes - 1) for i in batches.sample_ids(batch)]
    return (labels + torch.tensor(shifts, device=labels.device)) % classes


class InTurn(Training):
    """Steps of one batch each, forget batches with random labels first, then retain batches."""

    def __init__(self, loss_fn: LossFn, seed: int) -> None:
        super().__init__(loss_fn)
        self.seed = seed
        self.random = torch.Generator().manual_seed(seed)

    def length(self, forget: Loader, retain: Loader) -> int:
        """Every batch is a step."""
        return len(forget) + len(retain)

    def steps(self, forget: Loader, retain: Loader, epoch: int) -> Iterator[Step]:
        """The forget set first."""
        return in_turn(forget, retain, epoch)

    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """The mean loss of a retain batch, cross-entropy with changed labels of a forget batch."""
        if not step.of_forget:
            return self.mean_loss(model, step.batch)
        logits, labels = losses.logits_and_labels(model, step.batch)
        return F.cross_entropy(logits, self.labels(step.batch, labels, logits.shape[1]))

    def labels(self, batch: Batch, labels: Tensor, classes: int) -> Tensor:
        """Drawn uniformly."""
        return torch.randint(classes, labels.shape, generator=self.random).to(labels.device)


class _Mixed(InTurn):
    def steps(self, forget: Loader, retain: Loader, epoch: int) -> Iterator[Step]:
        """Batches of either set, shuffled."""
        gone, kept = iter(forget), iter(retain)
        order = torch.randperm(self.length(forget, retain), generator=self.random)
        for of_forget in (order < len(forget)).tolist():
            yield Step(next(gone if of_forget else kept), of_forget, epoch)

    def labels(self, batch: Batch, labels: Tensor, classes: int) -> Tensor:
        """Never the true one, and the same in every epoch."""
        return wrong_labels(batch, labels, classes, self.seed)
