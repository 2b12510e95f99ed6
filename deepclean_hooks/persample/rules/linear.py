"""y = x W^T + b: the weight gradient of sample n is sum over t of g[n, t] x[n, t]^T, the bias
gradient sum of g.

N: samples, T: positions, O: outputs, D: inputs. Also `matmul` with a parameter matrix on the right,
and `addmm`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclean_hooks.persample.call import Call, Handlers
from deepclean_hooks.persample.layout import Unserved
from deepclean_hooks.persample.outer import squared_outer
from deepclean_hooks.persample.rule import Carried, Into, Rule, Squares
from deepclean_hooks.persample.rules.broadcast import meet_batched


class Linear(Rule):
    """Operands: weight (O, D) and bias (O,)."""

    def _rows(self, grad: Tensor) -> Tensor:
        return self.layout.rows(grad, self.n)  # (N, T, O)

    def squares(self, grad: Tensor, names: Collection[str], into: Into) -> Squares:
        g = self._rows(grad)
        result: Squares = {}
        if "weight" in names:
            x = self.layout.rows(self.saved, self.n)  # (N, T, D)
            result["weight"] = squared_outer(g, x, into.get("weight"))
        if "bias" in names:
            result["bias"] = g.sum(1).square().sum(0)
        return result

    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        g = self._rows(grad)
        result: dict[str, Tensor | Carried] = {}
        if "weight" in names:
            x = self.layout.rows(self.saved, self.n)  # (N, T, D)
            result["weight"] = g.transpose(1, 2) @ x
        if "bias" in names:
            result["bias"] = g.sum(1)
        return result


def meet_linear(call: Call) -> Tensor:
    """`F.linear(input, weight, bias)`."""
    a = call.bind("input", "weight", bias=None)
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if not call.is_data(x) or call.is_data(weight) or call.is_data(bias) or weight.dim() != 2:
        raise Unserved("linear with a weight that depends on the data")
    layout = call.layout(x)
    layout.require_outside(x, 1)
    out = F.linear(x, call.cut(weight), call.cut(bias))
    return call.serve(out, Linear(call.operands(weight=weight, bias=bias), call.n, x, layout))


def meet_matmul(call: Call) -> Tensor:
    """`x @ W` with a parameter matrix W (D, O); other products go to the broadcast rule."""
    x, weight = call.positional(2)
    if not (call.is_data(x) and call.is_parameter(weight) and weight.dim() == 2 and x.dim() >= 2):
        return meet_batched(call)
    layout = call.layout(x)
    layout.require_outside(x, 1)
    out = torch.matmul(x, call.cut(weight))
    return call.serve(out, Linear({"weight": weight.t()}, call.n, x, layout))


def meet_addmm(call: Call) -> Tensor:
    """`addmm(b, x, W)` with alpha = beta = 1, as transformers' Conv1D writes it."""
    a = call.bind("input", "mat1", "mat2", beta=1, alpha=1)
    bias, x, weight = a["input"], a["mat1"], a["mat2"]
    plain = a["beta"] == 1 and a["alpha"] == 1 and bias.dim() == 1
    if not plain or not call.is_data(x) or call.is_data(weight) or call.is_data(bias):
        raise Unserved("addmm of another form than bias + x W")
    layout = call.layout(x)
    layout.require_outside(x, 1)
    out = torch.addmm(call.cut(bias), x, call.cut(weight))
    operands = call.operands(bias=bias)
    if call.is_parameter(weight):
        operands["weight"] = weight.t()
    return call.serve(out, Linear(operands, call.n, x, layout))


def meet_bilinear(call: Call) -> Tensor:
    """`F.bilinear(a, b, W, bias)`: a linear layer over the products of every two inputs."""
    a = call.bind("input1", "input2", "weight", bias=None)
    one, two, weight, bias = a["input1"], a["input2"], a["weight"], a["bias"]
    if not call.is_data(one) or not call.is_data(two) or call.is_data(weight):
        raise Unserved("bilinear of another form than two inputs of data")
    x, flat = (one[..., :, None] * two[..., None, :]).flatten(-2), weight.flatten(1)
    layout = call.layout(x)
    layout.require_outside(x, 1)
    out = F.linear(x, call.cut(flat), call.cut(bias))
    return call.serve(out, Linear(call.operands(weight=flat, bias=bias), call.n, x, layout))


HANDLERS: Handlers = {
    F.linear: meet_linear,
    torch.bilinear: meet_bilinear,
    torch.addmm: meet_addmm,
    **dict.fromkeys(
        (
            torch.matmul,
            Tensor.matmul,
            Tensor.__matmul__,
            torch.mm,
            Tensor.mm,
            torch.bmm,
            Tensor.bmm,
        ),
        meet_matmul,
    ),
}
