"""S[o, d] = sum over n of (sum over t of G[n, t, o] X[n, t, d])^2: the squared weight gradient of
every sample.

N: samples, T: positions, O: outputs, D: inputs. Which way is fastest depends on T and O * D only;
the figures are ratios to the ordinary weight gradient G^T X, one thread, float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deepclean_hooks.persample import device

PAIRS_BYTES = 60_000_000  # of the products over position pairs, at most
BATCHED_BYTES = 2**28  # of per-sample gradients, and windows, held at once on an accelerator
CACHE_BYTES = 2**20  # of what a thread works on, where several samples fit
LANES_BYTES = 2**26  # of sums of squares side by side, at most
TILE_BYTES = 300_000  # of the result, so that a tile stays in the second-level cache


@dataclass(frozen=True)
class Product:
    """A sum of squares still to be multiplied out: left (N, O) and right (N, D) give left^T right.

    Exact for one position: (g x)^2 = g^2 x^2, so sum over n of (g_n x_n^T)^2 = (G^2)^T (X^2). Kept
    as factors it can wait for other batches and be multiplied once: on a 100M-entry head 0.90 times
    a backward instead of 2.08.
    """

    left: Tensor
    right: Tensor

    def value(self) -> Tensor:
        """The sum of squares, (O, D)."""
        return self.left.t() @ self.right


def squared_outer(grad: Tensor, data: Tensor, into: Tensor | None = None) -> Tensor | Product:
    """The sum over samples of the squared (O, D) product of grad (N, T, O) and data (N, T, D).

    Added to `into`, (O, D), where one is given and its layout in memory suits; the result is then
    `into` itself.
    """
    positions, entries = grad.shape[1], grad.shape[2] * data.shape[2]
    if positions == 1:
        return Product(grad[:, 0].square(), data[:, 0].square())
    if positions <= 3 or (positions == 4 and entries > 1 << 17):
        # FLOPs grow by (T + 1) / 2: 1.3 to 1.8 at T = 4, 10 at T = 16
        return _by_pairs(grad, data, into)
    if device.is_accelerator(grad):
        return _batched(grad, data, into)
    if entries > 1 << 19:
        return _tiled(grad, data, None if into is None else into.t()).t()
    # 1.16 (T = 197) to 1.4 (T = 37); batched on the CPU 1.3 to 3.2
    return _one_by_one(grad, data, into)


def viewed(into: Tensor | None, *shape: int) -> Tensor | None:
    """The same memory in another shape; None if that would take a copy."""
    try:
        return None if into is None else into.view(shape)
    except RuntimeError:
        return None


def fitting(into: Tensor | None, *shape: int) -> Tensor | None:
    """`into` if it lies in memory as a new tensor of the shape would."""
    fits = into is not None and into.shape == shape and into.is_contiguous()
    return into if fits else None


def start(into: Tensor | None, like: Tensor, *shape: int) -> Tensor:
    """Where to add: `into` if it lies in memory as a new tensor of the shape would, else zeros."""
    own = fitting(into, *shape)
    return like.new_zeros(shape) if own is None else own


class Lanes:
    """Sums of squares of several samples side by side, (lanes, *shape), for a CPU.

    One for each thread, which then works in its own cache: two threads on one sample's product took
    0.70 of one thread's time, two on two products 0.53. Several for each, as its cache allows,
    where they are so small that the calls cost more than the work.
    """

    def __init__(
        self, n: int, into: Tensor | None, like: Tensor, *shape: int, beside: int = 0
    ) -> None:
        """For n samples, each of which takes `beside` bytes more than its sum and its product."""
        self._into = fitting(into, *shape)
        size = max(1, math.prod(shape) * like.element_size())
        in_cache = max(1, CACHE_BYTES // (2 * size + beside))
        most = min(n, in_cache * torch.get_num_threads(), max(1, LANES_BYTES // size))
        self.count = next(count for count in range(most, 0, -1) if n % count == 0)
        # Not added to an empty one: its first squares go in as they are.
        self.empty = self._into is None or self.count > 1
        whole = self._into if self.count == 1 else None
        self.total = like.new_empty(self.count, *shape) if whole is None else whole[None]

    def sum(self) -> Tensor:
        """The lanes' sum, with what was in `into` if that suits."""
        own = self.total[0] if self.count == 1 else self.total.sum(0)
        return own if self._into is None or not self.empty else self._into.add_(own)


def square_each(
    total: Tensor, one: Tensor, other: Tensor, buffer: Tensor, into_empty: bool
) -> None:
    """total = or += (one @ other)^2 in each lane, the products in a buffer."""
    torch.bmm(one, other, out=buffer)
    if into_empty:
        torch.mul(buffer, buffer, out=total)
    else:
        total.addcmul_(buffer, buffer)


def at_a_time(like: Tensor, entries: int) -> int:
    """How many samples of so many entries each the budget of an accelerator holds."""
    return max(1, BATCHED_BYTES // (entries * like.element_size()))


def add_squares(total: Tensor, each: Tensor) -> None:
    """total += sum over samples of each^2, each (n, *total.shape): a norm reads it once, and a
    square and a sum would write it again."""
    total.add_(torch.linalg.vector_norm(each, dim=0).square_())


def _by_pairs(grad: Tensor, data: Tensor, into: Tensor | None) -> Tensor:
    """(sum_t g_t x_t)^2 = sum over t, u of (g_t g_u)(x_t x_u): one product over position pairs."""
    n, positions, outputs = grad.shape
    one, other = torch.triu_indices(positions, positions, device=grad.device)  # (pairs,) each
    weight = torch.where(one == other, 1.0, 2.0).to(grad)[:, None]
    total = start(into, grad, outputs, data.shape[2])
    pair_bytes = len(one) * (outputs + data.shape[2]) * grad.element_size()
    step = max(1, PAIRS_BYTES // pair_bytes)
    for first in range(0, n, step):
        g, x = grad[first : first + step], data[first : first + step]
        left = (g[:, one] * g[:, other]).mul_(weight).flatten(0, 1)  # (n pairs, O)
        total.addmm_(left.t(), (x[:, one] * x[:, other]).flatten(0, 1))
    return total


def _batched(grad: Tensor, data: Tensor, into: Tensor | None) -> Tensor:
    """A batched product, a bounded number of samples at a time: for accelerators."""
    total = start(into, grad, grad.shape[2], data.shape[2])
    step = at_a_time(total, total.numel())
    for first in range(0, len(grad), step):
        add_squares(total, grad[first : first + step].transpose(1, 2) @ data[first : first + step])
    return total


def _one_by_one(grad: Tensor, data: Tensor, into: Tensor | None) -> Tensor:
    """One sample's gradient at a time for each thread, in a buffer that stays in its cache."""
    lanes = Lanes(len(grad), into, grad, grad.shape[2], data.shape[2])
    buffer = torch.empty_like(lanes.total)
    parts = torch.split(grad.transpose(1, 2), lanes.count), torch.split(data, lanes.count)
    for at, (g, x) in enumerate(zip(*parts, strict=True)):
        square_each(lanes.total, g, x, buffer, lanes.empty and not at)
    return lanes.sum()


def _tiled(grad: Tensor, data: Tensor, into: Tensor | None) -> Tensor:
    """All samples over one tile of the (D, O) result after the other: for results larger than the
    cache."""
    outputs, inputs = grad.shape[2], data.shape[2]
    total = start(into, grad, inputs, outputs)
    step = max(16, min(inputs, TILE_BYTES // (grad.element_size() * outputs)))
    grad = grad.contiguous()
    for first in range(0, inputs, step):
        tile = total[first : first + step]
        lanes = Lanes(len(grad), tile, grad, *tile.shape)
        buffer = torch.empty_like(lanes.total)
        part = data[:, :, first : first + step].transpose(1, 2)  # (N, step, T)
        several = torch.split(grad, lanes.count), torch.split(part, lanes.count)
        for at, (g, x) in enumerate(zip(*several, strict=True)):
            square_each(lanes.total, x, g, buffer, lanes.empty and not at)
        lanes.sum()  # into the tile
    return total
