"""y = W[index]: row i of sample n's gradient is the sum of g[n, t] over the positions t with
index[n, t] = i.

N: samples, T: positions, V: rows of the table, D: entries of a row.
"""

from __future__ import annotations

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor

from deepclean_hooks.persample.call import Call, Handlers
from deepclean_hooks.persample.layout import Place, Unserved
from deepclean_hooks.persample.rule import Carried, Rule


class Embedding(Rule):
    """Operand: weight (V, D)."""

    def __init__(
        self, weight: Tensor, n: int, index: Tensor, layout: Place, padding: int | None
    ) -> None:
        super().__init__({"weight": weight}, n, layout, index)
        self.padding = padding

    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        weight = self.operands["weight"]
        g = self.layout.rows(grad, self.n)  # (N, T, D)
        index = self.layout.rows(self.saved[..., None], self.n)  # (N, T, 1)
        if self.padding is not None:
            g = g * (index != self.padding)
        each = g.new_zeros(self.n, *weight.shape)
        return {"weight": each.scatter_add_(1, index.expand_as(g), g)}


def meet_embedding(call: Call) -> Tensor:
    """`F.embedding(input, weight, padding_idx)` without max_norm."""
    a = call.bind(
        "input",
        "weight",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
        padding_idx=None,
        max_norm=None,
        scale_grad_by_freq=False,
    )
    index, weight, padding = a["input"], a["weight"], a["padding_idx"]
    if not call.is_data(index) or a["max_norm"] is not None or a["scale_grad_by_freq"]:
        raise Unserved("embedding with max_norm or scale_grad_by_freq")
    layout = call.layout(index)
    out = F.embedding(index, call.cut(weight), padding)
    if padding is not None and padding < 0:
        padding += weight.shape[0]
    return call.serve(out, Embedding(weight, call.n, index, layout, padding))


HANDLERS: Handlers = {F.embedding: meet_embedding}
