"""What a kernel sees at each place of a picture, and the squared weight gradients made of it.

N: samples, C and I: input channels, O: output channels, S: spatial dimensions, P: output positions,
K: kernel positions (kh, kw), W': output columns. A dense two-dimensional convolution's weight
gradient is a product with the windows of its input in channels-last order; which way is fastest
depends on P only. Ratios are to the ordinary weight gradient, one thread, float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclean_hooks.persample import device
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


def each(value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    """One number for each spatial dimension, as torch's convolutions understand the value."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


def sides(
    padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """How many zeros a convolution adds before and after each spatial dimension."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(padding, str)
    return tuple((size, size) for size in each(padding, len(kernel)))


def padded(x: Tensor, added: Sequence[tuple[int, int]]) -> Tensor:
    """The input (N, C, *S) with zeros around it."""
    last_first = [size for before_after in reversed(added) for size in before_after]
    return F.pad(x, last_first) if any(last_first) else x


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What a kernel sees at each place of a padded input (N, C, *S): (N, *places, C, *kernel), a
    view."""
    spatial = len(kernel)
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap]  # (..., places, ..., size)
    return x.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))


def squared_weight(
    x: Tensor, grad: Tensor, kernel: torch.Size, geometry: Geometry, into: Tensor | None
) -> Tensor | Product | None:
    """The sum over samples of the squared gradient (O, I, kh, kw) of a dense two-dimensional
    convolution with input x (N, I, H, W) and output gradient (N, O, H', W'), added to `into` where
    its layout in memory suits; None where the library's own weight gradient is faster.

    A `Product` is flat, (O, I).
    """
    positions = grad.shape[2:].numel()
    of = _Windows(x, grad, kernel, geometry)
    if kernel.numel() == 1 and not any(geometry.padding):
        return of.pointwise(into)
    if device.is_accelerator(grad):
        return of.by_batches(positions, into)
    if positions <= SMALL_MAP:
        return of.unfolded(positions, into)
    if positions >= LARGE_MAP:
        return None
    return of.by_kernel_rows(positions, into)  # 0.7 to 1.9; F.unfold, bmm: 1.8 to 9.5


class _Windows:
    """The input and the output gradient of one convolution."""

    def __init__(self, x: Tensor, grad: Tensor, kernel: torch.Size, geometry: Geometry) -> None:
        self.x, self.grad, self.kernel, self.geometry = x, grad, kernel, geometry
        self.n, self.inputs, self.outputs = len(x), x.shape[1], grad.shape[1]

    def pointwise(self, into: Tensor | None) -> Tensor | Product:
        """A 1 x 1 kernel is a linear layer over the positions."""
        step = self.geometry.stride
        x = self.x[:, :, :: step[0], :: step[1]].flatten(2).transpose(1, 2)  # (N, P, I)
        g = self.grad.flatten(2).transpose(1, 2)  # (N, P, O)
        squares = squared_outer(g, x, viewed(into, self.outputs, self.inputs))
        return squares if isinstance(squares, Product) else squares[:, :, None, None]

    def unfolded(self, positions: int, into: Tensor | None) -> Tensor:
        """As a linear layer whose inputs are the windows."""
        data = self._im2col().reshape(self.n, positions, -1)  # (N, P, K I)
        g = self.grad.flatten(2).transpose(1, 2)  # (N, P, O)
        squares = squared_outer(g, data, _channels_last(into))
        return self._channels_first(squares.value() if isinstance(squares, Product) else squares)

    def by_batches(self, positions: int, into: Tensor | None) -> Tensor:
        """A batched product with the windows of as many samples at a time as the budget holds: for
        accelerators, where one sample after the other would be a launch of kernels for each."""
        seen, maps = self._im2col(), self.grad.flatten(2)  # (N, H', W', kh, kw, I); (N, O, P)
        taps = self.kernel.numel() * self.inputs
        total = start(_channels_last(into), self.grad, self.outputs, taps)
        step = at_a_time(total, (positions + self.outputs) * taps)
        for first in range(0, self.n, step):
            data = seen[first : first + step].reshape(-1, positions, taps)  # a copy
            add_squares(total, maps[first : first + step] @ data)
        return self._channels_first(total)

    def by_kernel_rows(self, positions: int, into: Tensor | None) -> Tensor:
        """One product for each kernel row: its windows are a piece of what is copied once for all
        rows, so that kernel-width times the input is copied and not kernel-area times."""
        (kh, kw), outputs, height = self.kernel, self.outputs, self.grad.shape[2]
        width = kw * self.inputs
        stride, dilation = self.geometry.stride[0], self.geometry.dilation[0]
        rows = self._rows(height)  # (N, sh, Q, W', kw, I), a view
        own = None if into is None else viewed(into.permute(2, 0, 3, 1), kh, outputs, width)
        copy = rows[0].numel() * rows.element_size()
        lanes = Lanes(self.n, own, self.grad, kh, outputs, width, beside=copy)
        copied = rows.new_empty(lanes.count, *rows.shape[1:])
        starts = [divmod(row * dilation, stride) for row in range(kh)]
        seen = [
            copied[:, phase, first : first + height].view(-1, positions, width)
            for first, phase in starts
        ]
        buffer = self.grad.new_empty(lanes.count, outputs, width)
        maps = self.grad.flatten(2)  # (N, O, P)
        kernel_rows = list(zip(lanes.total.unbind(1), seen, strict=True))
        several = torch.split(maps, lanes.count), torch.split(rows, lanes.count)
        for at, (g, row) in enumerate(zip(*several, strict=True)):
            copied.copy_(row)
            for total, window in kernel_rows:
                square_each(total, g, window, buffer, lanes.empty and not at)
        return lanes.sum().view(kh, outputs, kw, self.inputs).permute(1, 3, 0, 2)

    def _rows(self, height: int) -> Tensor:
        """The window of a kernel row at each output column, for each row of the padded input that
        the kernel meets: (N, sh, Q, W', kw, I), a strided view, where row r is [r % sh, r // sh].
        """
        (kh, kw), above = self.kernel, self.geometry.padding[0]
        (sh, sw), (dh, dw) = self.geometry.stride, self.geometry.dilation
        quotients = height + (kh - 1) * dh // sh
        below = max(above, sh * quotients - self.x.shape[2] - above)
        x = self._padded(below)
        columns = (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
        a, b, c, _ = x.stride()
        shape = (x.shape[0], sh, quotients, columns, kw, x.shape[3])
        return x.as_strided(shape, (a, b, b * sh, c * sw, c * dw, 1))

    def _padded(self, below: int) -> Tensor:
        """The input in channels-last order with its zeros around it: (N, H, W, I)."""
        above, side = self.geometry.padding
        x = self.x.permute(0, 2, 3, 1)
        return F.pad(x, (0, 0, side, side, above, below)).contiguous()

    def _im2col(self) -> Tensor:
        """The windows under the kernel, (N, *places, *kernel, I), as a strided view of the padded
        input."""
        x = self._padded(self.geometry.padding[0]).permute(0, 3, 1, 2)
        seen = windows(x, self.kernel, self.geometry.stride, self.geometry.dilation)
        return seen.permute(0, 1, 2, 4, 5, 3)

    def _channels_first(self, total: Tensor) -> Tensor:
        return total.reshape(self.outputs, *self.kernel, self.inputs).permute(0, 3, 1, 2)


def _channels_last(total: Tensor | None) -> Tensor | None:
    """What `_channels_first` returned, as the (O, K I) it was made of, without a copy."""
    if total is None:
        return None
    return viewed(total.permute(0, 2, 3, 1), len(total), total[0].numel())
