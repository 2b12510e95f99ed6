"""The free entries of a model as small tensors of their own, so that an optimizer remembers only
those.

Letters: M is the number of free entries of a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks.guard import optimizers as kinds


class Compact:
    """One 1-D leaf for each parameter with free entries: gradients come in, values go out.

    A leaf holds the free entries in row-major order. Beside a leaf 4 bytes for each of its entries
    are kept (8 in a tensor of more than 2**31). Raises ValueError for parameters that are not plain
    dense tensors.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], free: Mapping[str, Tensor]) -> None:
        """`free`: bool masks of the parameters' shapes; those without a free entry are left out."""
        odd = [name for name in free if type(parameters[name].detach()) is not Tensor]
        if odd:
            raise ValueError(
                f"compact() needs plain tensors, not sharded ones or other subclasses: {odd}; "
                "build the optimizer on model.parameters(), which the guard holds too"
            )
        self._at: dict[int, Tensor] = {}  # by id() of the parameter: offsets in its memory, (M,)
        self._of: dict[int, tuple[str, nn.Parameter]] = {}
        self._seen: dict[str, int] = {}
        self.leaves: dict[str, nn.Parameter] = {}
        for name, mask in free.items():
            parameter = parameters[name]
            if parameter.requires_grad and bool(mask.any()):
                self._of[id(parameter)] = name, parameter
                self._at[id(parameter)] = _offsets(mask, parameter)
                line = _line(parameter.detach())
                self.leaves[name] = nn.Parameter(line.index_select(0, self._at[id(parameter)]))
                self._seen[name] = self.leaves[name]._version
        self._served = {
            id(self.leaves[name]): parameter for name, parameter in self._of.values()
        }  # by id() of the leaf

    def parameters(self) -> list[nn.Parameter]:
        """The model's parameters that have a leaf."""
        return [parameter for _, parameter in self._of.values()]

    def stepped_by(self, optimizer: Any) -> list[nn.Parameter]:
        """The model's parameters whose leaves the optimizer steps."""
        ids = (id(tensor) for tensor in kinds.tensors_of(optimizer))
        return [self._served[leaf] for leaf in ids if leaf in self._served]

    def has_gradient(self, parameter: Tensor) -> bool:
        """Whether the leaf of a parameter has a gradient."""
        named = self._of.get(id(parameter))
        return named is not None and self.leaves[named[0]].grad is not None

    def gather(self, parameter: Tensor) -> None:
        """Adds the gradient of the free entries to the leaf's, and takes it off the parameter.

        Raises RuntimeError if the leaf moved and the parameter did not follow, ValueError for a
        sparse gradient.
        """
        name = self._of[id(parameter)][0]
        leaf = self.leaves[name]
        grad, parameter.grad = parameter.grad, None
        if grad is None:
            return
        if leaf._version != self._seen[name]:
            raise RuntimeError(
                f"the compact tensor of {name} was written between steps, and the model was "
                "evaluated without that: an optimizer that evaluates the model inside its step "
                "(LBFGS, SAM) has to be built on model.parameters(), which the guard holds too"
            )
        if grad.layout is not torch.strided:
            raise ValueError(
                f"{name} has a {grad.layout} gradient, which compact() cannot take up; build the "
                "layer with sparse=False or the optimizer on model.parameters()"
            )
        if grad.stride() != parameter.stride():
            like = grad.new_empty_strided(parameter.shape, parameter.stride())  # gaps and all
            grad = like.copy_(grad)
        taken = _line(grad.detach()).index_select(0, self._at[id(parameter)])  # (M,)
        leaf.grad = taken if leaf.grad is None else leaf.grad.add_(taken)

    def scatter(self) -> None:
        """Writes the leaves that moved into the free entries of the parameters, and nothing
        else."""
        for name, parameter in self._of.values():
            leaf = self.leaves[name]
            at = self._at[id(parameter)].long()  # index_copy_ takes no int32
            _line(parameter.detach()).index_copy_(0, at, leaf.detach())
            self._seen[name] = leaf._version

    def require_elementwise(self, optimizer: Any) -> None:
        """Raises ValueError for an optimizer that needs the tensors in their shape."""
        why = kinds.coupling(optimizer)
        if why is not None:
            raise ValueError(
                f"{type(optimizer).__name__} cannot step compact tensors: {why}, and they have no "
                "rows, columns or frozen entries; build it on model.parameters(), which the guard "
                "holds too, or take Adam, AdamW or SGD"
            )


def _offsets(mask: Tensor, parameter: Tensor) -> Tensor:
    """Where in the parameter's memory its free entries lie, in row-major order: (M,)."""
    at = mask.to(parameter.device).nonzero()  # (M, D)
    offsets = (at * torch.tensor(parameter.stride(), device=at.device)).sum(1)
    return offsets.int() if _reach(parameter) < 2**31 else offsets


def _reach(tensor: Tensor) -> int:
    """How many entries of memory lie between a tensor's first and last entry, both counted."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def _line(tensor: Tensor) -> Tensor:
    """A tensor's memory as one line, in the same memory."""
    return tensor.as_strided((_reach(tensor),), (1,))
