"""Sees every torch function of a forward pass and hands those in which data meets parameters to the
rules.

A TorchFunctionMode, not module hooks: of 34 architectures 27 have parameters that no module hook
reaches (raw parameters, position tables, fused or functional projections).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deepclean_hooks.persample.call import BOTH, DATA, NEITHER, PARAMETER, Call, kind, mark
from deepclean_hooks.persample.forwards import Pass
from deepclean_hooks.persample.layout import Unserved
from deepclean_hooks.persample.rules import HANDLERS

# They read a shape, a dtype or a device of one side; no gradient passes between data and
# parameters.
_SHAPE_ONLY = {
    Tensor.type_as,
    Tensor.expand_as,
    Tensor.reshape_as,
    Tensor.view_as,
    Tensor.to,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
}
_EXPANSIONS = {
    Tensor.expand,
    Tensor.repeat,
    Tensor.tile,
    Tensor.broadcast_to,
    torch.tile,
    torch.broadcast_to,
    torch.repeat_interleave,
    Tensor.repeat_interleave,
}


def _entered(function: Any) -> Callable[..., Any]:
    """A copy of a composite of torch.nn.functional whose inner calls are seen.

    The original hands itself to the mode again as long as one is active, so its copy is told that
    none is.
    """
    names = {**function.__globals__}
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        names[name] = lambda *args: False
    copy = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


COMPOSITES = {F.multi_head_attention_forward: _entered(F.multi_head_attention_forward)}


def _writes_in_place(name: str) -> bool:
    if name.startswith("__i") and name.endswith("__"):
        return name != "__invert__"
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


class Interception(TorchFunctionMode):
    """Active during one forward pass; what happens at a meeting is the pass's business."""

    def __init__(self, forward: Pass) -> None:
        super().__init__()
        self.forward = forward

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one torch function, its parameter side cut if it meets the data."""
        kwargs = kwargs or {}
        sides = kind(args) | kind(kwargs)
        if sides == NEITHER:
            return func(*args, **kwargs)
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        if sides == BOTH and func in _SHAPE_ONLY:
            sides = kind(args[:1])
            out = func(*args, **kwargs)
        elif sides == BOTH:
            out = self._meet(func, args, kwargs)
        elif sides == PARAMETER and func in _EXPANSIONS:
            return self.forward.expanded(Call(func, args, kwargs, self.forward))
        else:
            out = func(*args, **kwargs)
        if sides & DATA:
            mark(out)
            if args and _writes_in_place(getattr(func, "__name__", "")):
                mark(args[0])
        return out

    def _meet(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(func, args, kwargs, self.forward)
        try:
            self.forward.begin(call)
            if func not in HANDLERS:
                raise Unserved("no rule for this operation")
            return HANDLERS[func](call)
        except Unserved as reason:
            return self.forward.unserved(call, str(reason))
