"""y = conv(x, W) + b: sample n's weight gradient is the correlation of its input with its output
gradient.

N: samples, R: maps of a sample (1 unless the batch was folded), O and I: output and input channels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclean_hooks.persample import windows
from deepclean_hooks.persample.call import Call, Handlers
from deepclean_hooks.persample.layout import Unserved
from deepclean_hooks.persample.outer import Product
from deepclean_hooks.persample.rule import Carried, Into, Rule, Squares
from deepclean_hooks.persample.windows import Geometry


@dataclass(eq=False, repr=False)
class Convolution(Rule):
    """Operands: weight (O, I / groups, *kernel) - or (I, O / groups, *kernel) if transposed - and
    bias (O,)."""

    weight: Tensor
    geometry: Geometry

    def lead(self, grad: Tensor) -> int:
        return 1

    def squares(self, grad: Tensor, names: Collection[str], into: Into) -> Squares:
        result: Squares = {}
        if "bias" in names:
            result["bias"] = self._bias(grad).square().sum(0)
        if "weight" in names:
            result["weight"] = self._squared_weight(grad, into.get("weight"))
        return result

    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        result: dict[str, Tensor | Carried] = {}
        if "bias" in names:
            result["bias"] = self._bias(grad)
        if "weight" in names:
            folded = not self.layout.each_once(self.saved, self.n)
            if self._depthwise() and not folded:
                result["weight"] = self._by_forward(grad)
            elif self.geometry.groups > 1 and not folded and not self.geometry.transposed:
                result["weight"] = self._by_groups(grad)
            else:
                result["weight"] = torch.stack(list(self._each(grad)))
        return result

    def _bias(self, grad: Tensor) -> Tensor:
        maps = self.layout.images(grad, self.n)  # (N, R, O, ...)
        return maps.reshape(*maps.shape[:3], -1).sum((1, 3))

    def _squared_weight(self, grad: Tensor, into: Tensor | None) -> Tensor | Product:
        geometry, kernel = self.geometry, self.weight.shape[2:]
        dense = geometry.groups == 1 and not geometry.transposed and len(kernel) == 2
        if not dense or not self.layout.each_once(self.saved, self.n):
            if geometry.groups == 1:
                return self._summed(grad, into)
            each = self.per_sample(grad, ["weight"])["weight"]
            assert isinstance(each, Tensor)
            return each.square_().sum(0)
        squares = windows.squared_weight(self.saved, grad, kernel, geometry, into)
        return self._summed(grad, into) if squares is None else squares

    def _summed(self, grad: Tensor, into: Tensor | None) -> Tensor:
        """The squares of one sample's weight gradient after the other; one gradient is held at a
        time."""
        total = torch.zeros_like(self.weight) if into is None else into
        for each in self._each(grad):
            total.addcmul_(each, each)
        return total

    def _each(self, grad: Tensor) -> list[Tensor] | map[Tensor]:
        """Each sample's weight gradient, by the library's backward."""
        x, g = self.layout.images(self.saved, self.n), self.layout.images(grad, self.n)
        return map(
            lambda i: self._native(x[i], g[i], self.weight, self.geometry.groups), range(self.n)
        )

    def _native(self, x: Tensor, g: Tensor, weight: Tensor, groups: int) -> Tensor:
        geometry = self.geometry
        out: Tensor = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.transposed,
            geometry.output_padding or [0] * len(geometry.stride),
            groups,
            [False, True, False],
        )[1]
        return out

    def _by_groups(self, grad: Tensor) -> Tensor:
        """The batch folded into the groups: one native call gives every sample's gradient."""
        x = self.saved.reshape(1, -1, *self.saved.shape[2:])
        g = grad.reshape(1, -1, *grad.shape[2:])
        weight = self.weight.repeat(self.n, *[1] * (self.weight.dim() - 1))
        each = self._native(x, g, weight, self.geometry.groups * self.n)
        return each.view(self.n, *self.weight.shape)

    def _depthwise(self) -> bool:
        geometry, weight = self.geometry, self.weight
        single = weight.shape[1] == 1 and weight.shape[0] == geometry.groups
        return single and weight.dim() == 4 and not geometry.transposed

    def _by_forward(self, grad: Tensor) -> Tensor:
        """Depthwise: the weight gradient is a convolution of x with kernel g, stride and dilation
        swapped.

        0.06 to 0.2 of the native weight gradient for 5 x 5 and 7 x 7 kernels, 0.67 to 1.2 for 3 x
        3.
        """
        x, geometry, (kh, kw) = self.saved, self.geometry, self.weight.shape[2:]
        planes = self.n * geometry.groups
        out = F.conv2d(
            x.reshape(1, planes, *x.shape[2:]),
            grad.reshape(planes, 1, *grad.shape[2:]),
            None,
            geometry.dilation,
            geometry.padding,
            geometry.stride,
            planes,
        )
        return out[:, :, :kh, :kw].reshape(self.n, *self.weight.shape)


def _padding(
    value: str | int | tuple[int, ...], kernel: torch.Size, dilation: tuple[int, ...]
) -> tuple[int, ...]:
    added = windows.sides(value, kernel, dilation)
    if any(before != after for before, after in added):
        raise Unserved("padding='same' with an uneven sum")
    return tuple(before for before, _ in added)


def meet_convolution(call: Call) -> Tensor:
    """`conv1d`, `conv2d`, `conv3d`."""
    a = call.bind("input", "weight", bias=None, stride=1, padding=0, dilation=1, groups=1)
    kernel = a["weight"].shape[2:]
    dilation = windows.each(a["dilation"], len(kernel))
    padding = _padding(a["padding"], kernel, dilation)
    geometry = Geometry(windows.each(a["stride"], len(kernel)), padding, dilation, a["groups"])
    return _meet(call, a, geometry)


def meet_transposed(call: Call) -> Tensor:
    """`conv_transpose1d`, `conv_transpose2d`, `conv_transpose3d`."""
    a = call.bind(
        "input", "weight", bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    )
    n = len(a["weight"].shape[2:])
    names = ("stride", "padding", "dilation", "output_padding")
    stride, padding, dilation, output_padding = (windows.each(a[k], n) for k in names)
    return _meet(call, a, Geometry(stride, padding, dilation, a["groups"], True, output_padding))


def _meet(call: Call, a: dict[str, Tensor], geometry: Geometry) -> Tensor:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if not call.is_data(x) or call.is_data(weight) or call.is_data(bias) or x.dim() != weight.dim():
        raise Unserved("convolution of another form than a batch of data with a parameter kernel")
    layout = call.layout(x)
    layout.require_first()
    out = torch.convolution(
        x,
        call.cut(weight),
        call.cut(bias),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding or (0,) * len(geometry.stride),
        geometry.groups,
    )
    operands = call.operands(weight=weight, bias=bias)
    return call.serve(out, Convolution(operands, call.n, x, layout, weight.detach(), geometry))


HANDLERS: Handlers = {
    torch.conv1d: meet_convolution,
    torch.conv2d: meet_convolution,
    torch.conv3d: meet_convolution,
    torch.conv_transpose1d: meet_transposed,
    torch.conv_transpose2d: meet_transposed,
    torch.conv_transpose3d: meet_transposed,
}
