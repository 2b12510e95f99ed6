"""y = W[index]: row i of sample n's gradient is the sum of g[n, t] over the positions t with
index[n, t] = i.

N: samples, T: positions, V: rows of the table, D: entries of a row.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclean_hooks.persample.call import Call, Handlers
from deepclean_hooks.persample.layout import Unserved
from deepclean_hooks.persample.rule import Carried, Into, Rule, Squares


@dataclass(eq=False, repr=False)
class Embedding(Rule):
    """Operand: weight (V, D). The data are the index; rows of the index `padding` do not count."""

    padding: int | None

    def squares(self, grad: Tensor, names: Collection[str], into: Into) -> Squares:
        g, index = self._read(grad)
        rows = len(self.operands["weight"])
        # Not the gradient of each sample, N times the table: only the rows that a sample reads.
        samples = torch.arange(self.n, device=index.device)[:, None] * rows
        keys = (samples + index[..., 0]).flatten()
        read, which = torch.unique(keys, return_inverse=True)
        sums = g.new_zeros(len(read), g.shape[-1]).index_add_(0, which, g.flatten(0, 1))
        total = g.new_zeros(rows, g.shape[-1])
        return {"weight": total.index_add_(0, read % rows, sums.square_())}

    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        weight = self.operands["weight"]
        g, index = self._read(grad)
        each = g.new_zeros(self.n, *weight.shape)
        return {"weight": each.scatter_add_(1, index.expand_as(g), g)}

    def _read(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient (N, T, D) and the index (N, T, 1) of every row that was read."""
        g = self.layout.rows(grad, self.n)
        index = self.layout.rows(self.saved[..., None], self.n)
        return (g, index) if self.padding is None else (g * (index != self.padding), index)


def meet_embedding(call: Call) -> Tensor:
    """`F.embedding(input, weight, padding_idx)`; with max_norm, no row is longer than that."""
    a = call.bind(
        "input",
        "weight",
        padding_idx=None,
        max_norm=None,
        norm_type=2.0,
        scale_grad_by_freq=False,
        sparse=False,
    )
    index, weight, padding = a["input"], a["weight"], a["padding_idx"]
    if not call.is_data(index) or a["scale_grad_by_freq"]:
        raise Unserved("embedding with scale_grad_by_freq")
    layout = call.layout(index)
    out = F.embedding(index, call.cut(weight), padding)
    if padding is not None and padding < 0:
        padding += weight.shape[0]
    return call.serve(out, Embedding({"weight": weight}, call.n, index, layout, padding))


def meet_index(call: Call) -> Tensor:
    """`w[index]` of a parameter by whole numbers of the data, along its first dimension."""
    weight, index = call.positional(2)
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if not call.is_parameter(weight) or not call.is_data(index) or not _whole(index):
        raise Unserved("an index of another form than whole numbers along dimension 0")
    return _looked_up(call, weight, index)


def meet_index_select(call: Call) -> Tensor:
    """`index_select(w, 0, index)`."""
    a = call.bind("input", "dim", "index")
    if a["dim"] != 0 or not call.is_parameter(a["input"]):
        raise Unserved("index_select of another form than rows of a parameter")
    return _looked_up(call, a["input"], a["index"])


def _whole(index: Any) -> bool:
    return isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool


def _looked_up(call: Call, weight: Tensor, index: Tensor) -> Tensor:
    layout = call.layout(index)
    table = weight if weight.dim() == 2 else weight.reshape(len(weight), -1)
    index = torch.where(index < 0, index + len(weight), index).long()
    rule = Embedding({"weight": table}, call.n, index, layout, None)
    out = call.serve(F.embedding(index, call.cut(table)), rule)
    return out.view(*index.shape, *weight.shape[1:])


HANDLERS: Handlers = {
    F.embedding: meet_embedding,
    Tensor.__getitem__: meet_index,
    torch.index_select: meet_index_select,
    Tensor.index_select: meet_index_select,
}
