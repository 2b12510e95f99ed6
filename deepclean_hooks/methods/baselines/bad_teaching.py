"""Bad teaching: on the forget set the model learns from an untrained teacher, elsewhere from itself
as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.methods.additive import Additive
from deepclean_hooks.methods.selecting import Selection
from deepclean_hooks.methods.settings import require_positive, require_shares
from deepclean_hooks.methods.teachers import divergence, fresh, frozen, softened
from deepclean_hooks.methods.term import Drawn, Original, Term
from deepclean_hooks.methods.training import Loader, Step, Training


@dataclass(frozen=True)
class BadTeaching(Additive):
    """Adds KL(teacher || model) at a temperature on D_f, where the teacher is an untrained network.

    Chundawat, Tarun, Mandal, Kankanhalli: "Can Bad Teaching Induce Forgetting?", AAAI 2023,
    equation 4, whose half on D_r (KL from the original) your own loss takes the place of.
    `as_published` has both halves and no loss of yours: D_f and `share` of D_r, mixed within each
    batch as in their notebook; only `unlearn` can train so. Mixed, because BatchNorm then sees
    about the statistics of all data; a batch of D_f alone gives another gradient (cosine 0.35).
    The divergence is averaged over samples; their code divides by the classes too, which the
    learning rate then has to make up for: DeepClean's table has ten times theirs, and ten times the
    epochs, which explains its low retain accuracy. `build` makes the untrained network, as in
    Retrain.
    """

    share: float = 0.3
    temperature: float = 1.0
    build: Callable[[], nn.Module] | None = None
    _: KW_ONLY
    weight: float = 1.0
    as_published: bool = False
    name = "bad teaching"

    def __post_init__(self) -> None:
        """Raises ValueError unless share is above 0 and at most 1, and the others are positive."""
        super().__post_init__()
        require_positive(temperature=self.temperature, weight=self.weight)
        require_shares(share=self.share)

    @property
    def own_training(self) -> bool:
        """Whether both halves were asked for."""
        return self.as_published

    def term(self) -> Term | None:
        """The divergence from the untrained network on D_f."""
        return None if self.as_published else _Untaught(self)

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """With copies of the model as teachers."""
        bad = fresh(model, seed=self.seed, build=self.build)
        return _Taught(loss_fn, self, frozen(copy.deepcopy(model)), frozen(bad))


class _Untaught(Term):
    def __init__(self, method: BadTeaching) -> None:
        self._method, self.seed = method, method.seed
        self._teacher: _Stateless | None = None

    def prepare(self, original: Original) -> None:
        """The untrained network; raises ValueError if it cannot be made."""
        self._teacher = self._made(original.model)

    def losses(self, model: nn.Module, loss_fn: LossFn, drawn: Drawn) -> Tensor:
        """The weighted divergence of each sample."""
        if self._teacher is None:  # in a resumed run: by the seed, the same again
            self._teacher = self._made(model)
        method, batch = self._method, drawn.batch
        target = softened(self._teacher, batch, method.temperature)
        return method.weight * divergence(model, target, batch, method.temperature)

    def _made(self, model: nn.Module) -> _Stateless:
        return _Stateless(model, fresh(model, seed=self._method.seed, build=self._method.build))


class _Stateless(nn.Module):
    """A model with another's weights and buffers, in eval mode.

    Not a copy of the model: what Accelerate puts into its `forward` would still run the original.
    """

    def __init__(self, model: nn.Module, like: nn.Module) -> None:
        super().__init__()
        self._run = [model]  # in a list, so that it is no submodule
        tensors = {**dict(like.named_parameters()), **dict(like.named_buffers())}
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's output under these weights."""
        (model,) = self._run
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            return torch.func.functional_call(model, self._tensors, args, kwargs)
        finally:
            for module, was in modes:
                module.training = was


class _Taught(Training):
    def __init__(
        self, loss_fn: LossFn, method: BadTeaching, good: nn.Module, bad: nn.Module
    ) -> None:
        super().__init__(loss_fn)
        self.method, self.good, self.bad = method, good, bad
        self.random = torch.Generator().manual_seed(method.seed)

    def length(self, forget: Loader, retain: Loader) -> int:
        """Every forget sample and the share of retain samples, in the retain set's batches."""
        count = _count(forget) + self._kept(retain)
        return -(-count // (retain.batch_size or 1))

    def steps(self, forget: Loader, retain: Loader, epoch: int) -> Iterator[Step]:
        """Batches of both sets together, in random order."""
        chosen = torch.randperm(_count(retain), generator=self.random)[: self._kept(retain)]
        part = Subset(retain.dataset, chosen.tolist())
        both: ConcatDataset[Any] = ConcatDataset([forget.dataset, part])
        size = retain.batch_size or 1
        order = torch.split(torch.randperm(len(both), generator=self.random), size)
        loader = DataLoader(
            both,
            batch_sampler=[positions.tolist() for positions in order],
            collate_fn=retain.collate_fn,
            num_workers=retain.num_workers,
            generator=torch.Generator(),
        )
        for batch, positions in zip(loader, order, strict=True):
            if len(positions) == 1 < size:
                return  # BatchNorm cannot train on a batch of one
            yield Step(batch, positions < _count(forget), epoch)

    def objective(self, model: nn.Module, step: Step) -> Tensor:
        """KL from the teacher that each sample's set has, the mean over the batch."""
        temperature = self.method.temperature
        bad, good = (softened(net, step.batch, temperature) for net in (self.bad, self.good))
        of_forget = torch.as_tensor(step.of_forget, device=bad.device).view(-1, 1)
        return divergence(model, torch.where(of_forget, bad, good), step.batch, temperature).mean()

    def _kept(self, retain: Loader) -> int:
        return max(1, round(self.method.share * _count(retain)))


def _count(loader: Loader) -> int:
    dataset: Any = loader.dataset
    return len(dataset)
