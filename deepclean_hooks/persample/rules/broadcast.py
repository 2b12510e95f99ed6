"""Operands that are broadcast over the samples: position embeddings, scales, bias tables,
temperatures, queries.

The operand is expanded to the operation's full shape before it meets the data; the gradient of that
expansion, summed over every dimension but the samples' wherever the operand was broadcast, is each
sample's gradient (chain rule of `expand`). An operand that holds the samples itself
(`token.repeat(N, 1, 1)`) is tapped as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclean_hooks.persample.call import Call, Handlers
from deepclean_hooks.persample.layout import Layout, Place, Unserved
from deepclean_hooks.persample.rule import Carried, Rule


class Broadcast(Rule):
    """Operand: w, of a shape that broadcasts to the gradient's."""

    def __init__(self, operand: Tensor, n: int, layout: Place) -> None:
        super().__init__({"w": operand}, n, None, layout)

    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        return {"w": self.layout.unbroadcast(grad, self.operands["w"].shape, self.n)}


class Carrying(Broadcast):
    """Operand: w, which has the samples in `layout` itself."""

    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        return {"w": Carried(grad, self.layout)}


def _tap(call: Call, operand: Tensor, full: torch.Size, layout: Place) -> Tensor:
    """The operand expanded to `full` (in which the samples have `layout`) and tapped."""
    held = layout.held_by(operand.shape, full)
    if held is not None:
        return call.tap(operand.detach(), Carrying(operand, call.n, held))
    return call.tap(operand.detach().expand(full), Broadcast(operand, call.n, layout))


def _common_shape(shapes: Iterable[torch.Size]) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return shape


def meet_elementwise(call: Call) -> Tensor:
    """Elementwise operations: every tensor is broadcast to one shape."""
    if call.name.endswith("_") and call.is_parameter(call.args[0]) and call.name[-2:] != "__":
        raise Unserved("data written into a parameter in place")
    reference = call.largest_data()
    full = _common_shape(t.shape for t in call.tensors())
    layout = call.layout(reference).broadcast(reference.shape, full)
    result: Tensor = call.with_parameters(lambda w: _tap(call, w, full, layout))
    return result


def meet_prelu(call: Call) -> Tensor:
    """`prelu(x, w)`, one slope or one for each channel of dimension 1."""
    x, slope = call.positional(2)
    if not call.is_data(x):
        raise Unserved("prelu of a parameter")
    if slope.numel() > 1:
        slope = slope.view(-1, *[1] * (x.dim() - 2))
    layout = call.layout(x)
    return torch.where(x >= 0, x, _tap(call, slope, x.shape, layout) * x)


def meet_masked_fill(call: Call) -> Tensor:
    """`masked_fill(x, mask, w)` with a single value that is a parameter."""
    x, mask, value = call.positional(3)
    if not call.is_data(x) or not call.is_parameter(value):
        raise Unserved("masked_fill of a parameter")
    full = _common_shape((x.shape, mask.shape))
    layout = call.layout(x).broadcast(x.shape, full)
    return torch.where(mask, _tap(call, value, full, layout), x)


def meet_batched(call: Call) -> Tensor:
    """Batched products: operands (..., rows, columns) whose leading dimensions are broadcast."""
    reference = call.largest_data()
    if reference.dim() < 3 or any(t.dim() < 2 for t in call.tensors()):
        raise Unserved("a product without a batch dimension")
    lead = _common_shape(t.shape[:-2] for t in call.tensors())
    layout = call.layout(reference)
    layout.require_outside(reference, 2)
    layout = layout.broadcast(reference.shape, (*lead, *reference.shape[-2:]))

    def tap(w: Tensor) -> Tensor:
        return _tap(call, w, torch.Size((*lead, *w.shape[-2:])), layout)

    result: Tensor = call.with_parameters(tap)
    return result


def meet_joined(call: Call) -> Tensor:
    """`cat` and `stack`: parameters joined to data must hold the samples themselves."""
    reference = call.largest_data()
    layout = call.layout(reference)

    def tap(w: Tensor) -> Tensor:
        held = layout.held_by(w.shape, reference.shape) if w.dim() == reference.dim() else None
        if held is not None:
            return call.tap(w.detach(), Carrying(w, call.n, held))
        if isinstance(layout, Layout):
            raise Unserved("a parameter joined to the data along the samples")
        return call.tap(w.detach(), Broadcast(w, call.n, layout))

    result: Tensor = call.with_parameters(tap)
    return result


_NAMES = [
    "add",
    "sub",
    "mul",
    "div",
    "multiply",
    "subtract",
    "divide",
    "true_divide",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clip",
    "fmax",
    "fmin",
    "atan2",
    "logaddexp",
    "hypot",
    "xlogy",
    "where",
    "maximum",
    "minimum",
    "addcmul",
    "addcdiv",
    "lerp",
    "pow",
]
_IN_PLACE = [
    f"{name}_"
    for name in ("add", "sub", "mul", "div", "multiply", "subtract", "divide", "addcmul", "lerp")
] + ["pow_", "clamp_", "clip_"]
_OPERATORS = [
    "add",
    "radd",
    "iadd",
    "sub",
    "isub",
    "mul",
    "rmul",
    "imul",
    "truediv",
    "itruediv",
    "pow",
]

HANDLERS: Handlers = {
    **dict.fromkeys((getattr(torch, name) for name in _NAMES), meet_elementwise),
    **dict.fromkeys(
        (getattr(Tensor, name) for name in _NAMES + _IN_PLACE if hasattr(Tensor, name)),
        meet_elementwise,
    ),
    **dict.fromkeys((getattr(Tensor, f"__{name}__") for name in _OPERATORS), meet_elementwise),
    **dict.fromkeys((Tensor.__rsub__, torch.rsub, Tensor.__rtruediv__), meet_elementwise),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate, torch.stack), meet_joined),
    F.prelu: meet_prelu,
    torch.masked_fill: meet_masked_fill,
    Tensor.masked_fill: meet_masked_fill,
    F.scaled_dot_product_attention: meet_batched,
}
