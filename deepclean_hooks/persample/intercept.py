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
from deepclean_hooks.persample.forwards import Pass, writes_in_place
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


# They turn the data into numbers of Python's, on which the forward may branch.
_READS = {
    Tensor.item,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__bool__,
    Tensor.is_nonzero,
}
# They move rows by what the data is; `getitem` and the like where the index is data.
_MOVES = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    torch.nonzero,
    Tensor.nonzero,
    torch.argwhere,
    Tensor.argwhere,
    torch.masked_select,
    Tensor.masked_select,
    torch.unique,
    torch.unique_consecutive,
    torch.functional.unique,
    torch.functional.unique_consecutive,
    Tensor.unique,
    Tensor.unique_consecutive,
    Tensor.masked_scatter,
    Tensor.masked_scatter_,
    torch.masked_scatter,
    torch._VF._pack_padded_sequence,
}
_INDEXED = {
    getattr(place, name)
    for place in (torch, Tensor)
    for stem in (
        "index_select",
        "gather",
        "take",
        "take_along_dim",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "index_add",
        "index_copy",
        "index_put",
        "index_fill",
        "index_reduce",
        "repeat_interleave",
    )
    for name in (stem, f"{stem}_")
    if hasattr(place, name)
} | {Tensor.__getitem__, Tensor.__setitem__, F.embedding}


_LOOKED_AT = _READS | _MOVES | _INDEXED


def _moves(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation on the data moves rows of the data by what the data is."""
    if func in _MOVES:
        return True
    if func is F.embedding:  # a table of data
        return DATA in (kind(args[1:2]), kind(kwargs.get("weight")))
    if func is Tensor.__getitem__:
        return kind(args[0]) == kind(args[1]) & DATA == DATA
    if func is Tensor.__setitem__:
        return bool(kind(args[1]) & kind(args[2]) & DATA)
    return func in _INDEXED and bool(kind([args[1:], kwargs]) & DATA)


def _is_number(args: tuple[Any, ...]) -> bool:
    """Whether a parameter is indexed by a single whole number."""
    index = args[1]
    whole = isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point()
    return whole and index.dtype != torch.bool and kind(args[0]) == PARAMETER


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
        elif sides == BOTH and func is Tensor.__getitem__ and _is_number(args):
            # A block of a parameter, chosen by a number of the data: an expert.
            number = int(args[1])
            self.forward.branched = True
            self.forward.read(number)
            return func(args[0], number)
        elif sides == BOTH:
            out = self._meet(func, args, kwargs)
        elif sides == PARAMETER and func in _EXPANSIONS:
            return self.forward.expanded(Call(func, args, kwargs, self.forward))
        else:
            out = func(*args, **kwargs)
        if sides & DATA:
            if func in _LOOKED_AT:
                self._look(func, args, kwargs, out)
            if self.forward.every:
                out = self.forward.passed(Call(func, args, kwargs, self.forward), out)
            mark(out)
            if args and writes_in_place(getattr(func, "__name__", "")):
                mark(args[0])
        return out

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func not in _READS:
            self.forward.wanders |= _moves(func, args, kwargs)
        elif isinstance(out, int):
            self.forward.branched = True
            self.forward.read(out)

    def _meet(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(func, args, kwargs, self.forward)
        try:
            self.forward.begin(call)
            if func not in HANDLERS:
                raise Unserved("no rule for this operation")
            return HANDLERS[func](call)
        except Unserved as reason:
            return self.forward.unserved(call, str(reason))
