"""y = conv(x, W) + b: sample n's weight gradient is the correlation of its input with its output
gradient.

N: samples, R: maps of a sample (1 unless the batch was folded), O and I: output and input channels,
P: output positions, K: kernel positions (kh, kw), W': output columns. Dense two-dimensional
convolutions become products with windows of the input in channels-last order; which way is fastest
depends on P only. Ratios are to the ordinary weight gradient, one thread, float32.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclean_hooks.persample import device
from deepclean_hooks.persample.call import Call, Handlers
from deepclean_hooks.persample.layout import Layout, Unserved
from deepclean_hooks.persample.outer import (
    Lanes,
    Product,
    add_squares,
    at_a_time,
    square_each,
    squared_outer,
    start,
    viewed,
)
from deepclean_hooks.persample.rule import Carried, Into, Rule, Squares

# Positions from which the library's own weight gradient, a sample at a time, wins: 0.8 to 1.2 at 56
# x 56. Below, a single sample is often too little for it: 2.3 to 2.9 for 16 maps of 32 x 32.
LARGE_MAP = 2048
SMALL_MAP = 16  # positions up to which result tiles kept in cache win: 1.2 to 1.6 at 4 x 4


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation, groups and output padding, one entry for each spatial
    dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


class Convolution(Rule):
    """Operands: weight (O, I / groups, *kernel) - or (I, O / groups, *kernel) if transposed - and
    bias (O,)."""

    def __init__(
        self,
        operands: dict[str, Tensor],
        n: int,
        x: Tensor,
        layout: Layout,
        weight: Tensor,
        geometry: Geometry,
    ) -> None:
        super().__init__(operands, n, x)
        self.layout, self.weight, self.geometry = layout, weight.detach(), geometry

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
            folded = self.saved.shape[0] != self.n
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
        if not dense or self.saved.shape[0] != self.n:
            if geometry.groups == 1:
                return self._summed(grad, into)
            each = self.per_sample(grad, ["weight"])["weight"]
            assert isinstance(each, Tensor)
            return each.square_().sum(0)
        positions = grad.shape[2:].numel()
        if kernel.numel() == 1 and not any(geometry.padding):
            return self._pointwise(grad, into)
        if device.is_accelerator(grad):
            return self._by_batches(grad, positions, into)
        if positions <= SMALL_MAP:
            return self._unfolded(grad, positions, into)
        if positions >= LARGE_MAP:
            return self._summed(grad, into)
        return self._by_kernel_rows(grad, positions, into)  # 0.7 to 1.9; F.unfold, bmm: 1.8 to 9.5

    def _pointwise(self, grad: Tensor, into: Tensor | None) -> Tensor | Product:
        """A 1 x 1 kernel is a linear layer over the positions."""
        step = self.geometry.stride
        x = self.saved[:, :, :: step[0], :: step[1]]
        g, x = grad.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2)  # (N, P, O), (N, P, I)
        squares = squared_outer(g, x, viewed(into, *self.weight.shape[:2]))
        return squares if isinstance(squares, Product) else squares[:, :, None, None]

    def _unfolded(self, grad: Tensor, positions: int, into: Tensor | None) -> Tensor:
        data = self._im2col().reshape(self.n, positions, -1)  # (N, P, K I)
        g = grad.flatten(2).transpose(1, 2)  # (N, P, O)
        squares = squared_outer(g, data, self._channels_last(into))
        return self._channels_first(squares.value() if isinstance(squares, Product) else squares)

    def _by_batches(self, grad: Tensor, positions: int, into: Tensor | None) -> Tensor:
        """A batched product with the windows of as many samples at a time as the budget holds: for
        accelerators, where one sample after the other would be a launch of kernels for each."""
        windows, maps = self._im2col(), grad.flatten(2)  # (N, H', W', kh, kw, I), a view; (N, O, P)
        outputs, taps = len(self.weight), self.weight[0].numel()
        total = start(self._channels_last(into), grad, outputs, taps)
        step = at_a_time(total, (positions + outputs) * taps)
        for first in range(0, self.n, step):
            data = windows[first : first + step].reshape(-1, positions, taps)  # a copy
            add_squares(total, maps[first : first + step] @ data)
        return self._channels_first(total)

    def _by_kernel_rows(self, grad: Tensor, positions: int, into: Tensor | None) -> Tensor:
        """One product for each kernel row: its windows are a piece of what is copied once for all
        rows, so that kernel-width times the input is copied and not kernel-area times."""
        (outputs, inputs, kh, kw), height = self.weight.shape, grad.shape[2]
        stride, dilation = self.geometry.stride[0], self.geometry.dilation[0]
        rows = self._rows(height)  # (N, sh, Q, W', kw, I), a view
        own = None if into is None else viewed(into.permute(2, 0, 3, 1), kh, outputs, kw * inputs)
        copy = rows[0].numel() * rows.element_size()
        lanes = Lanes(self.n, own, grad, kh, outputs, kw * inputs, beside=copy)
        copied = rows.new_empty(lanes.count, *rows.shape[1:])
        starts = [divmod(row * dilation, stride) for row in range(kh)]
        windows = [
            copied[:, phase, first : first + height].view(-1, positions, kw * inputs)
            for first, phase in starts
        ]
        buffer = grad.new_empty(lanes.count, outputs, kw * inputs)
        maps = grad.flatten(2)  # (N, O, P)
        kernel_rows = list(zip(lanes.total.unbind(1), windows, strict=True))
        several = torch.split(maps, lanes.count), torch.split(rows, lanes.count)
        for at, (g, row) in enumerate(zip(*several, strict=True)):
            copied.copy_(row)
            for total, window in kernel_rows:
                square_each(total, g, window, buffer, lanes.empty and not at)
        return lanes.sum().view(kh, outputs, kw, inputs).permute(1, 3, 0, 2)

    def _rows(self, height: int) -> Tensor:
        """The window of a kernel row at each output column, for each row of the padded input that
        the kernel meets: (N, sh, Q, W', kw, I), a strided view, where row r is [r % sh, r // sh].
        """
        geometry, (kh, kw), above = self.geometry, self.weight.shape[2:], self.geometry.padding[0]
        (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
        quotients = height + (kh - 1) * dh // sh
        below = max(above, sh * quotients - self.saved.shape[2] - above)
        x = self._padded(below)
        columns = (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
        a, b, c, _ = x.stride()
        shape = (x.shape[0], sh, quotients, columns, kw, x.shape[3])
        return x.as_strided(shape, (a, b, b * sh, c * sw, c * dw, 1))

    def _padded(self, below: int) -> Tensor:
        """The input in channels-last order with its zeros around it: (N, H, W, I)."""
        above, side = self.geometry.padding
        x = self.saved.permute(0, 2, 3, 1)
        return F.pad(x, (0, 0, side, side, above, below)).contiguous()

    @staticmethod
    def _channels_last(total: Tensor | None) -> Tensor | None:
        """What `_channels_first` returned, as the (O, K I) it was made of, without a copy."""
        if total is None:
            return None
        return viewed(total.permute(0, 2, 3, 1), len(total), total[0].numel())

    def _channels_first(self, total: Tensor) -> Tensor:
        outputs, inputs, *kernel = self.weight.shape
        return total.reshape(outputs, *kernel, inputs).permute(0, 3, 1, 2)

    def _im2col(self) -> Tensor:
        """The windows under the kernel, (N, *positions, *kernel, I), as a strided view of the
        padded input."""
        geometry, (kh, kw) = self.geometry, self.weight.shape[2:]
        (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
        x = self._padded(geometry.padding[0])
        n, height, width, channels = x.shape
        rows, columns = (
            (height - dh * (kh - 1) - 1) // sh + 1,
            (width - dw * (kw - 1) - 1) // sw + 1,
        )
        a, b, c, _ = x.stride()
        return x.as_strided(
            (n, rows, columns, kh, kw, channels), (a, b * sh, c * sw, b * dh, c * dw, 1)
        )

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


def _tuple(value: int | tuple[int, ...] | list[int], length: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) * (length if len(value) == 1 else 1)


def _padding(
    value: str | int | tuple[int, ...], kernel: torch.Size, dilation: tuple[int, ...]
) -> tuple[int, ...]:
    if value == "valid":
        return (0,) * len(kernel)
    if value == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            raise Unserved("padding='same' with an uneven sum")
        return tuple(t // 2 for t in total)
    assert not isinstance(value, str)
    return _tuple(value, len(kernel))


def meet_convolution(call: Call) -> Tensor:
    """`conv1d`, `conv2d`, `conv3d`."""
    a = call.bind(
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "dilation",
        "groups",
        bias=None,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
    )
    kernel = a["weight"].shape[2:]
    dilation = _tuple(a["dilation"], len(kernel))
    padding = _padding(a["padding"], kernel, dilation)
    geometry = Geometry(_tuple(a["stride"], len(kernel)), padding, dilation, a["groups"])
    return _meet(call, a, geometry)


def meet_transposed(call: Call) -> Tensor:
    """`conv_transpose1d`, `conv_transpose2d`, `conv_transpose3d`."""
    a = call.bind(
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
        bias=None,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        dilation=1,
    )
    n = len(a["weight"].shape[2:])
    names = ("stride", "padding", "dilation", "output_padding")
    stride, padding, dilation, output_padding = (_tuple(a[k], n) for k in names)
    return _meet(call, a, Geometry(stride, padding, dilation, a["groups"], True, output_padding))


def _meet(call: Call, a: dict[str, Tensor], geometry: Geometry) -> Tensor:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if not call.is_data(x) or call.is_data(weight) or call.is_data(bias) or x.dim() != weight.dim():
        raise Unserved("convolution of another form than a batch of data with a parameter kernel")
    layout = call.layout(x)
    if layout.dim != 0:
        raise Unserved(f"samples lie in dimension {layout.dim} of a channels-first tensor")
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
    return call.serve(out, Convolution(operands, call.n, x, layout, weight, geometry))


HANDLERS: Handlers = {
    torch.conv1d: meet_convolution,
    torch.conv2d: meet_convolution,
    torch.conv3d: meet_convolution,
    torch.conv_transpose1d: meet_transposed,
    torch.conv_transpose2d: meet_transposed,
    torch.conv_transpose3d: meet_transposed,
}
