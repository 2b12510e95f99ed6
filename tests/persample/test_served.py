"""Every torch function that a rule serves, called on a parameter of its own: a table with a row for
each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepclean_hooks import fisher_diagonal
from deepclean_hooks.persample.rules import HANDLERS
from lab.reference import relative_error, squared_gradients

Row = tuple[tuple[int, ...], Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]]
"""The parameter's shape, and how the function f is called on data x (N, 6) and the parameter w."""


def convolution(dimensions: int) -> Row:
    size = {1: (6,), 2: (2, 3), 3: (1, 2, 3)}[dimensions]
    kernel = {1: (3,), 2: (2, 2), 3: (1, 2, 2)}[dimensions]
    return (2, 1, *kernel), lambda f, x, w: f(x.view(-1, 1, *size), w)


def transposed(dimensions: int) -> Row:
    (_, _, *kernel), call = convolution(dimensions)
    return (1, 2, *kernel), call


def expanded(w: Tensor, x: Tensor) -> Tensor:
    return w.expand(len(x), *w.shape)


def chosen(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Tensor:
    return f(x > 0, x, w) if f is torch.where else f(x, x > 0, w)


PRODUCT: Row = ((6, 3), lambda f, x, w: f(x, w))
ELEMENTWISE: Row = ((6,), lambda f, x, w: f(x.clone(), w))
JOINED: Row = ((6,), lambda f, x, w: f([expanded(w, x), x], 1))
ROWS: dict[str, Row] = {
    **dict.fromkeys(("matmul", "__matmul__", "mm"), PRODUCT),
    "linear": ((3, 6), lambda f, x, w: f(x, w)),
    "addmm": ((6, 3), lambda f, x, w: f(torch.ones(3, dtype=x.dtype), x, w)),
    "bmm": ((6, 3), lambda f, x, w: f(x.unsqueeze(1), expanded(w, x))),
    **{f"conv{d}d": convolution(d) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": transposed(d) for d in (1, 2, 3)},
    "batch_norm": ((6,), lambda f, x, w: f(x, torch.zeros(6).to(x), torch.ones(6).to(x), w)),
    "layer_norm": ((6,), lambda f, x, w: f(x, (6,), w)),
    "rms_norm": ((6,), lambda f, x, w: f(x, (6,), w)),
    "group_norm": ((6,), lambda f, x, w: f(x, 2, w)),
    "instance_norm": ((2,), lambda f, x, w: f(x.view(-1, 2, 3), None, None, w)),
    "embedding": ((2, 3), lambda f, x, w: f((x > 0).long(), w)),
    "einsum": ((6, 3), lambda f, x, w: f("ni,ij->nj", x, w)),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "true_divide", "rdiv"), ELEMENTWISE),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin", "prelu"), ELEMENTWISE),
    **dict.fromkeys(("multiply", "subtract", "divide"), ELEMENTWISE),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip"), ELEMENTWISE),
    **dict.fromkeys(("atan2", "logaddexp", "hypot", "xlogy"), ELEMENTWISE),
    "masked_fill": ((), lambda f, x, w: f(x, x > 0.2, w)),
    "__getitem__": ((2, 3), lambda f, x, w: f(w, (x[:, 0] > 0).long())),
    "bilinear": ((3, 6, 6), lambda f, x, w: f(x, x.sin(), w)),
    "index_select": ((2, 3), lambda f, x, w: f(w, 0, (x[:, 0] > 0).long())),
    **dict.fromkeys(("radd", "iadd", "isub", "rmul", "imul", "truediv", "idiv"), ELEMENTWISE),
    "where": ((6,), chosen),
    "addcmul": ((6,), lambda f, x, w: f(x.clone(), x, w)),
    "addcdiv": ((6,), lambda f, x, w: f(x.clone(), w, 1 + x.abs())),
    "lerp": ((6,), lambda f, x, w: f(x.clone(), w, 0.3)),
    "pow": ((6,), lambda f, x, w: f(1 + x.abs(), w)),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), JOINED),
    "scaled_dot_product_attention": (
        (1, 2),
        lambda f, x, w: f(expanded(w, x), x.view(-1, 3, 2), x.view(-1, 3, 2)),
    ),
}
# Layers whose call has a dozen arguments, tried as modules in test_rules.py.
LAYERS = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
SERVED = [function for function in HANDLERS if function.__name__ not in LAYERS]


def row_of(function: Callable[..., Tensor]) -> Row:
    """A method and its in-place form have the row of the function."""
    name = function.__name__
    return ROWS[name] if name in ROWS else ROWS[name.strip("_")]


class Calling(nn.Module):
    """The function's result on the parameter, projected to five logits."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape, self.call = row_of(function)
        self.function = [function]  # in a list: a module would take it for a method
        self.w = nn.Parameter(0.5 + torch.rand(shape))
        width = self.call(function, torch.randn(2, 6), self.w.detach()).flatten(1).shape[1]
        self.register_buffer("head", torch.randn(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.function[0], x, self.w).flatten(1) @ self.head


def named(function: Callable[..., Tensor]) -> str:
    return f"{getattr(function, '__module__', None) or 'Tensor'}.{function.__name__}"


@pytest.mark.parametrize("function", SERVED, ids=named)
def test_function_is_served_and_exact(function: Callable[..., Tensor]) -> None:
    """Fails if a function is served without a row here, leaves the fast path, or is wrong."""
    model = Calling(function).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    y = torch.arange(7) % 5
    found = fisher_diagonal(model, TensorDataset(x, y), batch_size=4, progress=False)
    assert relative_error(found.sums, squared_gradients(model, x, y)) <= 1e-9
    assert not found.settings["one_sample_loop"]


def test_no_row_without_a_function() -> None:
    """Fails if a function is no longer served and its row stays."""
    names = {function.__name__ for function in HANDLERS}
    assert set(ROWS) | LAYERS <= names | {name.strip("_") for name in names}
