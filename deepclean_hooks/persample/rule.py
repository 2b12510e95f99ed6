"""What a rule is: it turns an operation's saved input and output gradient into squared per-sample
gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import InitVar, dataclass

from torch import Tensor

from deepclean_hooks.persample.layout import Place
from deepclean_hooks.persample.outer import Product

Squares = dict[str, Tensor | Product]
"""Operand name -> sum over the samples of its squared gradient, in the operand's shape."""


Into = Mapping[str, Tensor]
"""Operand name -> a sum of squares to add to, in the operand's shape."""


@dataclass(frozen=True)
class Carried:
    """The gradient of an operand that itself holds the samples, in the operand's shape and
    `layout`."""

    grad: Tensor
    layout: Place


@dataclass(eq=False, repr=False)
class Rule(ABC):
    """One operation in which data met parameters.

    `operands` are its parameter-side tensors by the name of their argument; `n` counts the samples;
    `x` is the data that the rule needs later, freed after use; `layout` is where the samples lie in
    it. A rule is used once, when the gradient of the operation's output arrives.
    """

    operands: dict[str, Tensor]
    n: int
    x: InitVar[Tensor | None]
    layout: Place

    def __post_init__(self, x: Tensor | None) -> None:
        self._saved: Tensor | None = None
        if x is not None:
            self.keep(x)

    def keep(self, x: Tensor) -> None:
        """The data that the rule will need."""
        self._saved, self._version = x.detach(), x._version

    @property
    def saved(self) -> Tensor:
        """The data kept from the forward; raises RuntimeError if it was overwritten since."""
        assert self._saved is not None
        if self._saved._version != self._version:
            raise RuntimeError(
                f"an activation of shape {tuple(self._saved.shape)} was modified in place after "
                f"{type(self).__name__.lower()} had used it, so its gradient is lost; use the "
                "out-of-place form"
            )
        return self._saved

    def lead(self, grad: Tensor) -> int:
        """How many leading dimensions of the output's gradient samples may vary over."""
        return max(1, grad.dim() - 1)

    def bytes_per_sample(self) -> int:
        """What the rule holds for each sample beyond activations: 0 for nearly all."""
        return 0

    def free(self) -> None:
        """Drops the saved data."""
        self._saved = None

    def squares(self, grad: Tensor, names: Collection[str], into: Into) -> Squares:
        """The sum over samples of the squared gradients of the named operands.

        A rule may add to `into[name]` and return that very tensor: it saves two passes over it.
        """
        each = self.per_sample(grad, names)
        return {k: g.square().sum(0) for k, g in each.items() if isinstance(g, Tensor)}

    @abstractmethod
    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        """The gradient of each sample, (N, *operand.shape), for the named operands."""


class FusedRule(Rule):
    """A rule that computes the gradient of the operation's input along with the squares.

    Where both read the same tensors, one pass over them serves both.
    """

    @abstractmethod
    def input_gradient(self, grad: Tensor, needed: bool) -> Tensor | None:
        """The gradient of the operation's input, None if it is not needed; comes first, and may
        keep what `per_sample` asks for."""
