"""One operation in which data meets parameters, as a rule's handler sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from deepclean_hooks.data.batches import tensors
from deepclean_hooks.persample.layout import Place
from deepclean_hooks.persample.rule import FusedRule, Rule

NEITHER, DATA, PARAMETER, BOTH = 0, 1, 2, 3
_MARK = "_deepclean_depends_on_data"  # set on activations only, which die with the forward

T = TypeVar("T")


def mark(value: object) -> None:
    """Notes that every tensor in `value` depends on the data."""
    for tensor in tensors(value):
        setattr(tensor, _MARK, True)


def kind(value: object) -> int:
    """DATA, PARAMETER (a tensor that requires gradients and does not depend on the data), BOTH or
    NEITHER."""
    if isinstance(value, Tensor):
        if getattr(value, _MARK, False):
            return DATA
        return PARAMETER if value.requires_grad else NEITHER
    sides = NEITHER
    for tensor in tensors(value):
        sides |= kind(tensor)
    return sides


def notes(tensor: Tensor) -> dict[str, Any]:
    """What was noted of an activation, for an alias of it."""
    return {name: value for name, value in vars(tensor).items() if name.startswith("_deepclean_")}


class Forward(ABC):
    """One forward pass under interception: what is done at each meeting of data and parameters."""

    n: int

    @abstractmethod
    def layout(self, x: Tensor) -> Place:
        """Where the samples lie in `x`; raises Unserved if that is not known."""

    @abstractmethod
    def serve(self, out: Tensor, rule: Rule) -> Tensor:
        """The output of an operation, its gradient handed to the rule in the backward pass."""

    @abstractmethod
    def serve_fused(self, run: Callable[[Tensor], Tensor], x: Tensor, rule: FusedRule) -> Tensor:
        """`run(x)`, with the rule as its backward."""

    @abstractmethod
    def tap(self, value: Tensor, rule: Rule) -> Tensor:
        """A detached operand, its gradient handed to the rule in the backward pass."""


class Call:
    """A torch function with its arguments, and the forward pass it happens in."""

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        forward: Forward,
    ) -> None:
        self.func, self.args, self.kwargs, self.forward = func, args, dict(kwargs), forward
        self.n = forward.n
        self.layout, self.tap = forward.layout, forward.tap
        self.serve, self.serve_fused = forward.serve, forward.serve_fused

    @property
    def name(self) -> str:
        """The function's name, for reports."""
        return getattr(self.func, "__name__", str(self.func))

    def bind(self, *names: str, **defaults: Any) -> dict[str, Any]:
        """The arguments by the function's own parameter names: those without a default, then the
        others, in the function's order."""
        given = dict(zip((*names, *defaults), self.args, strict=False))
        return {**defaults, **given, **self.kwargs}

    def positional(self, count: int) -> tuple[Any, ...]:
        """The first `count` arguments, however they were passed."""
        return (*self.args, *self.kwargs.values())[:count]

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return tensors([self.args, self.kwargs])

    @staticmethod
    def is_data(value: object) -> bool:
        """Whether it is a tensor that depends on the data."""
        return isinstance(value, Tensor) and kind(value) == DATA

    @staticmethod
    def is_parameter(value: object) -> bool:
        """Whether it is a parameter, or a tensor made of parameters alone."""
        return isinstance(value, Tensor) and kind(value) == PARAMETER

    @classmethod
    def cut(cls, value: T) -> T:
        """The value with its parameter-side tensors detached, so that autograd computes nothing for
        them."""
        cut: T = cls._replace(value, lambda t: t.detach())
        return cut

    @classmethod
    def _replace(cls, value: Any, change: Callable[[Tensor], Tensor], side: int = PARAMETER) -> Any:
        if isinstance(value, Tensor):
            return change(value) if kind(value) == side else value
        if isinstance(value, list | tuple):
            return type(value)(cls._replace(item, change, side) for item in value)
        return value

    def with_parameters(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Calls the function with each parameter-side operand replaced."""
        args = self._replace(list(self.args), change)
        kwargs = {key: self._replace(value, change) for key, value in self.kwargs.items()}
        return self.func(*args, **kwargs)

    def with_data(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Calls the function with each data operand replaced."""
        args = self._replace(list(self.args), change, DATA)
        kwargs = {key: self._replace(value, change, DATA) for key, value in self.kwargs.items()}
        return self.func(*args, **kwargs)

    @classmethod
    def operands(cls, **named: Tensor | None) -> dict[str, Tensor]:
        """Those of the named arguments that are on the parameter side."""
        return {k: t for k, t in named.items() if t is not None and cls.is_parameter(t)}

    def largest_data(self) -> Tensor:
        """The data operand with the most entries: the one whose layout the output has."""
        return max((t for t in self.tensors() if self.is_data(t)), key=lambda t: t.numel())


Handler = Callable[[Call], Tensor]
Handlers = Mapping[Callable[..., Any], Handler]


def merge(tables: Iterable[Handlers]) -> dict[Callable[..., Any], Handler]:
    """One table of handlers; a function with two rules is our own mistake."""
    merged: dict[Callable[..., Any], Handler] = {}
    for table in tables:
        assert not merged.keys() & table.keys()
        merged.update(table)
    return merged
