"""Adds a term's gradient to the one that an optimizer is about to step by."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.methods.term import Drawn, Term
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks import fsdp


class Adding:
    """Called before each step: a forward and backward pass of a forget batch, whose gradient is
    added to the loop's.

    The gradient is the mean over the batch, over all ranks together, each sample on one rank. It
    comes after the loop's clipping, which bounds the loop's loss alone, and in plain units whatever
    a GradScaler did. The pass runs without autocast, in the weights' own precision: without the
    scaler's factor small gradients would vanish in float16. It draws from a random state of its
    own, by the term's seed and the number of the step, so that the loop's data and dropout are as
    without it, and a resumed run goes on with the batch that was next.
    """

    def __init__(
        self,
        term: Term,
        model: nn.Module,
        forget: Samples | None,
        loss_fn: LossFn,
        *,
        done: int = 0,
    ) -> None:
        """`forget` may be None for a term that draws no batches; `done`: the steps of the run that
        this one goes on from. Raises ValueError for forget samples without indices."""
        self.term, self.done = term, done
        self._model, self._loss_fn = unwrap(model), loss_fn
        self._busy = False
        self._drawn: Drawn | None = None
        self._batches: Iterator[Drawn] = iter(())
        if term.draws and forget is not None:
            self._batches = _drawn(forget, term.seed, done)

    def __call__(self, optimizer: Any, stepped: Mapping[str, Tensor], again: bool) -> None:
        """Adds to the gradients of `stepped`; `again` is the same batch once more."""
        # torch 2.7 waits for ever where a hook of a backward pass runs another.
        if self._busy or torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "an optimizer steps inside the backward pass, where a method's term cannot be "
                "added; call step() after backward()"
            )
        _unscale(optimizer, stepped)
        step = self.done - 1 if again else self.done
        self._busy = True
        try:
            added = self._gradients(stepped, step, again) if self.term.draws else {}
        finally:
            self._busy = False
        for name, tensor in stepped.items():
            _combine(tensor, self.term.of_yours, added.get(name))
        with torch.no_grad():
            self.term.adjust(stepped, step)
        self.done = step + 1

    def _gradients(
        self, stepped: Mapping[str, Tensor], step: int, again: bool
    ) -> dict[str, Tensor | None]:
        """The term's gradient for each tensor; those that are there stay as they are."""
        held = {id(t): (t, t.grad) for t in (*self._model.parameters(), *stepped.values())}
        try:
            for tensor, _ in held.values():
                tensor.grad = None
            self._backward(step, again)
            mine = {name: tensor.grad for name, tensor in stepped.items()}
        finally:
            for tensor, grad in held.values():
                tensor.grad = grad
        return mine if fsdp.is_sharded(self._model) else _over_ranks(mine, stepped)

    def _backward(self, step: int, again: bool) -> None:
        device = no_trace.device_of(self._model)
        rank, world = ranks.world()
        with no_trace.own_precision(self._model, evaluates=self.term.evaluates) as dtype:
            _seed((self.term.seed * 1_000_003 + step) * world + rank)
            if not again or self._drawn is None:
                self._drawn = next(self._batches)
            drawn = self._drawn
            batch = batches.to(drawn.batch, device, dtype)
            local = Drawn(batch, drawn.whole, drawn.mine, step)
            each = self.term.losses(self._model, self._loss_fn, local)
            losses.per_sample(each, batches.size(batch))
            # A rank without a sample of this batch repeats one, which does not count.
            counted = len(range(rank, len(drawn.whole), world)) > 0
            total = each.sum() * (counted / len(drawn.whole))
            # FSDP2 averages over the ranks by itself.
            loss: Any = total * world if fsdp.is_sharded(self._model) else total
            loss.backward()


def _seed(number: int) -> None:
    """Seeds every global generator that a data set's transform or a layer may draw from."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def positions(count: int, size: int, seed: int, first: int = 0) -> Iterator[Tensor]:
    """The positions (size,) of batch `first`, `first + 1`, ... among `count` samples: passes in
    random order, one after another, cut into batches."""
    orders: dict[int, Tensor] = {}
    at = first * size
    while True:
        passes = torch.arange(at, at + size)
        orders = {
            number: orders[number] if number in orders else _order(count, seed, number)
            for number in range(at // count, (at + size - 1) // count + 1)
        }
        yield torch.stack([orders[int(p) // count][int(p) % count] for p in passes])
        at += size


def _order(count: int, seed: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(count, generator=generator)


class _Mine:
    """This rank's positions of each batch, for a DataLoader."""

    def __init__(self, *drawn: int) -> None:
        self._drawn = drawn

    def __iter__(self) -> Iterator[list[int]]:
        for whole in positions(*self._drawn):
            yield whole[_mine(len(whole))].tolist()


def _mine(size: int) -> Tensor:
    """This rank's places in a batch; the first place where it has none."""
    rank, world = ranks.world()
    places = torch.arange(rank, size, world)
    return places if len(places) else torch.zeros(1, dtype=torch.int64)


def _drawn(forget: Samples, seed: int, first: int) -> Iterator[Drawn]:
    if forget.indices is None:
        raise ValueError(
            "forget batches are drawn in random order, and only samples with indices can be; pass "
            "a Dataset with a length as the forget set"
        )
    count = len(forget.indices)
    size = min(forget.batch_size, count)
    loader = DataLoader(
        Subset(forget.dataset, list(forget.indices)),
        batch_sampler=_Mine(count, size, seed, first),
        collate_fn=forget.collate_fn,
        generator=torch.Generator().manual_seed(seed),
        **forget.options,
    )
    return _paired(loader, positions(count, size, seed, first), first)


def _paired(loader: DataLoader[Any], order: Iterator[Tensor], first: int) -> Iterator[Drawn]:
    for step, (batch, whole) in enumerate(zip(loader, order, strict=False), first):
        yield Drawn(batch, whole, _mine(len(whole)), step)


def _unscale(optimizer: Any, stepped: Mapping[str, Tensor]) -> None:
    """Divides the gradients by a GradScaler's factor where it left that to the optimizer, as it
    does for fused ones."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for tensor in stepped.values():
        if tensor.grad is not None:
            tensor.grad.div_(scale.to(tensor.grad.device))
    optimizer.grad_scale = None


def _combine(tensor: Tensor, of_yours: float, added: Tensor | None) -> None:
    if tensor.grad is not None and of_yours != 1:
        tensor.grad.mul_(of_yours)
    if added is None:
        return
    if tensor.grad is None:
        tensor.grad = added
    elif tensor.grad.layout is added.layout:
        tensor.grad.add_(added)
    else:
        tensor.grad = tensor.grad + added  # one of them sparse


def _over_ranks(
    mine: dict[str, Tensor | None], stepped: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """The sum over ranks of each gradient, in one message for each dtype and device; None where no
    rank has a gradient."""
    if ranks.world()[1] == 1:
        return mine
    messages: dict[str, list[Tensor]] = {}
    for name, tensor in stepped.items():
        gradient = mine[name]
        here = torch.zeros_like(tensor) if gradient is None else gradient.to_dense()
        has = torch.full((1,), float(gradient is not None), dtype=here.dtype, device=here.device)
        messages.setdefault(f"{here.dtype} {here.device}", []).extend([has, here.flatten()])
    sums = {kind: torch.cat(parts) for kind, parts in messages.items()}
    ranks.sum_over_ranks(sums)
    split = {
        kind: iter(torch.split(sums[kind], [len(part) for part in messages[kind]])) for kind in sums
    }
    summed: dict[str, Tensor | None] = {}
    for name, tensor in stepped.items():
        parts = split[f"{tensor.dtype} {tensor.device}"]
        has, gradient = next(parts), next(parts)
        summed[name] = gradient.view(tensor.shape) if bool(has) else None
    return summed
