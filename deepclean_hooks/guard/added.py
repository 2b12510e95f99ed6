"""Gradients that a method adds to the loop's own, at the last moment before an optimizer reads
them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepclean_hooks.guard import optimizers as kinds

BeforeStep = Callable[[Any, Mapping[str, Tensor], bool], None]
"""Called with the optimizer, the tensors by parameter name that it is about to step, and whether
this is a further evaluation within the same step. May change their gradients, and no others."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Added:
    """Calls `before_step` once a step: at its beginning, or, if a closure computes the gradients
    inside the step (Lightning, LBFGS), after each call of the closure."""

    def __init__(self, before_step: BeforeStep, masked: Callable[[Any], None]) -> None:
        """`masked(optimizer)` sets the gradients of frozen entries to 0 again."""
        self._before_step, self._masked = before_step, masked

    def begin(
        self, optimizer: Any, stepped: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> Call | None:
        """A step begins; `args` (the optimizer first) and `kwargs` are its call's. Returns the call
        that is to be made instead, or None."""
        outer = kinds.stepping_around(optimizer)
        if outer is not optimizer and "step" not in kinds.unseen_writers(outer):
            return None  # the optimizer around this one was seen, and its step is this one
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._add(optimizer, stepped, again=False)
            return None
        calls = 0

        @functools.wraps(closure)
        def added(*given: Any, **named: Any) -> Any:
            nonlocal calls
            loss = closure(*given, **named)
            self._add(optimizer, stepped, again=calls > 0)
            calls += 1
            return loss

        if len(args) > 1:
            return (args[0], added, *args[2:]), kwargs
        return args, {**kwargs, "closure": added}

    def begin_unseen(
        self, optimizer: Any, stepped: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> None:
        """A step begins that torch's hooks do not see; raises RuntimeError if it has a closure."""
        if any("step" not in kinds.unseen_writers(inner) for inner in kinds.layers(optimizer)[1:]):
            return  # they see the optimizer inside it, and call `begin`
        if self.begin(optimizer, stepped, (optimizer, *args), kwargs) is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} computes gradients in a closure, and torch's step "
                "hooks do not see it, so nothing can be added to them; call backward() before "
                "step(), or take an optimizer that derives from torch.optim.Optimizer"
            )

    def _add(self, optimizer: Any, stepped: Mapping[str, Tensor], *, again: bool) -> None:
        with torch.enable_grad():  # Lookahead steps what is inside it under no_grad
            self._before_step(optimizer, stepped, again)
        self._masked(optimizer)
