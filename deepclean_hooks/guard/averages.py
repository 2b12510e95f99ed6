"""Averages of a model (EMA, SWA) that were begun before the reset: they keep what is to be
forgotten, and many training scripts save them as the result."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks.guard.account import checksums
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks.fsdp import is_sharded
from deepclean_hooks.stored.bits import bits

# Class names, of bases too: torch's AveragedModel and torchvision's ExponentialMovingAverage on it,
# timm's ModelEma, V2 and V3, torch_ema's, Lightning's WeightAveraging, diffusers' EMAModel. Not
# "Schema".
_AVERAGING = re.compile(r"Ema(?![a-z])|EMA|Averag|SWA|Polyak")


@dataclass(frozen=True)
class Average:
    """An object that keeps a copy of a model's parameters: the copies by the model's names."""

    holder: object
    copies: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """The name of the holder's class."""
        return type(self.holder).__name__


class Averages:
    """What is alive at the reset that averages a model, or is a plain copy of it.

    Averages are recognised by the names of their classes. A plain copy may be a gold model or an
    average made by hand; a copy that moves while the loop runs is an average.
    """

    def __init__(self, model: nn.Module, reset: Mapping[str, Tensor]) -> None:
        """`reset`: masks of the entries that were reset. Walks the objects of the process once
        (about 0.05 s for a million)."""
        self._model = unwrap(model)
        self.stale: list[str] = []  # class names of averages that differ in a reset entry
        self._copies: list[tuple[weakref.ref[nn.Module], dict[str, int]]] = []
        if is_sharded(self._model):
            return
        self._search(reset)
        if self.stale:
            gc.collect()  # an average of an earlier run may be garbage by now
            self._search(reset)

    def _search(self, reset: Mapping[str, Tensor]) -> None:
        self.stale, self._copies = [], []
        parameters = dict(self._model.named_parameters())
        seen = {id(parameter) for parameter in parameters.values()}
        averages, modules = _alive(type(self._model))
        for holder in averages:
            for copies in _copies_in(holder, parameters):
                # A callback and the AveragedModel in it hold the same copies.
                if seen.isdisjoint(map(id, copies.values())):
                    seen.update(map(id, copies.values()))
                    average = Average(holder, copies)
                    if stale(average, self._model, reset):
                        self.stale.append(average.name)
        for module in modules:
            copies = _by_name(dict(module.named_parameters()), parameters)
            if copies and seen.isdisjoint(map(id, copies.values())):
                self._copies.append((weakref.ref(module), checksums(copies)))

    def remarks(self) -> list[str]:
        """What has to be said when the guard is set: stale averages, by class."""
        return [
            f"{name} averages this model since before the reset and keeps what is to be forgotten; "
            "call run.refresh(average) before your loop, or build the average after the reset"
            for name in self.stale
        ]

    def moved(self) -> list[str]:
        """What has to be said at the end: plain copies from before the reset that moved."""
        parameters = dict(self._model.named_parameters())
        moved = 0
        for reference, then in self._copies:
            module = reference()
            if module is not None:
                copies = _by_name(dict(module.named_parameters()), parameters)
                moved += bool(copies) and checksums(copies) != then
        if not moved:
            return []
        return [
            f"{moved} {'copy' if moved == 1 else 'copies'} of this model from before the reset "
            f"({type(self._model).__name__}) moved while the loop ran: an average keeps what is to "
            "be forgotten (call run.refresh(copy) before the loop), and a copy that was trained is "
            "not this model"
        ]

    def refreshed(self, average: Average) -> None:
        """An average or a copy begins anew: it may move from now on."""
        ours = set(map(id, average.copies.values()))
        self._copies = [
            (reference, then)
            for reference, then in self._copies
            if (module := reference()) is not None and ours.isdisjoint(map(id, module.parameters()))
        ]


def of(holder: object, model: nn.Module) -> Average:
    """What an object keeps of a model's parameters: a module with a copy of the model in it, or an
    object whose attribute is a module, a list or a dict of tensors.

    Raises ValueError if nothing in it has the names and shapes of the model's parameters.
    """
    parameters = dict(unwrap(model).named_parameters())
    for copies in _copies_in(holder, parameters):
        return Average(holder, copies)
    raise ValueError(
        f"{type(holder).__name__} holds no copy of this model: looked for a module, a list or a "
        f"dict of tensors with the shapes of its {len(parameters)} parameters, beside the model"
    )


def stale(average: Average, model: nn.Module, free: Mapping[str, Tensor]) -> bool:
    """Whether an average differs from the model in an entry that may train (the masks `free`)."""
    for name, parameter in unwrap(model).named_parameters():
        if name in free and name in average.copies:
            copied = average.copies[name].detach().to(parameter.device, parameter.dtype)
            if bool(((bits(copied) != bits(parameter)) & free[name].to(parameter.device)).any()):
                return True
    return False


@torch.no_grad()
def refresh(holder: object, model: nn.Module) -> Average:
    """Writes the model's parameters into an average or a copy of it, which begins anew from there.

    Raises ValueError if nothing in it has the names and shapes of the model's parameters.
    """
    average = of(holder, model)
    for name, parameter in unwrap(model).named_parameters():
        if name in average.copies:
            average.copies[name].copy_(parameter)
    for part in (holder, *vars(holder).values()):
        count = getattr(part, "n_averaged", None) if isinstance(part, nn.Module) else None
        if isinstance(count, Tensor):
            count.zero_()  # else the next update weighs the reset weights as so many models
    return average


class _Kinds(dict[type, bool]):
    """Whether objects of a class average a model, by the names of the class and its bases."""

    def __missing__(self, kind: type) -> bool:
        names = " ".join(base.__name__ for base in kind.__mro__)
        averages = self[kind] = _AVERAGING.search(names) is not None
        return averages


def _alive(kind: type[nn.Module]) -> tuple[list[Any], list[nn.Module]]:
    """The averaging objects of the process, and the modules of this very class."""
    averaging = _Kinds({Averages: False, Average: False})  # those of earlier runs
    of_model = averaging[kind]
    averaging[kind] = True
    # No step of Python's for each object, of which a process has a million.
    objects = gc.get_objects()
    alive = list(compress(objects, map(averaging.__getitem__, map(type, objects))))
    modules = [] if of_model else [module for module in alive if type(module) is kind]
    return [holder for holder in alive if of_model or type(holder) is not kind], modules


def _copies_in(holder: Any, parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Copies of the parameters in an object, in its attributes or child modules."""
    attributes = getattr(holder, "__dict__", {})
    children = attributes.get("_modules") or {}
    for value in (holder, *attributes.values(), *children.values()):
        if isinstance(value, nn.Module):
            copies = _by_name(dict(value.named_parameters()), parameters)
        elif isinstance(value, dict):
            copies = _by_name(value, parameters)
        elif isinstance(value, list | tuple):
            copies = _in_order(value, parameters)
        else:
            continue
        if copies and not any(copies[name] is parameters[name] for name in copies):
            yield copies


def _by_name(values: Mapping[Any, Any], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values under the parameters' names, which may all stand behind the same prefix."""
    first = next(iter(parameters), None)
    if first is None:
        return {}
    plain = {str(name).replace("_orig_mod.", ""): value for name, value in values.items()}
    for name in plain:
        if name == first or name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            copies = {wanted: plain.get(prefix + wanted) for wanted in parameters}
            if _fit(copies, parameters):
                return {wanted: copy for wanted, copy in copies.items() if copy is not None}
    return {}


def _in_order(values: Iterable[Any], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values, if they are as many as the parameters or the trainable ones and fit in order."""
    listed = list(values)
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    for names in (list(parameters), trainable):
        if names and len(names) == len(listed):
            copies = dict(zip(names, listed, strict=True))
            if _fit(copies, parameters):
                return copies
    return {}


def _fit(copies: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> bool:
    return all(
        isinstance(copy, Tensor) and copy.shape == parameters[name].shape
        for name, copy in copies.items()
    )
