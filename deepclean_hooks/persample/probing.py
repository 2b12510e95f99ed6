"""The forward passes that find out where the samples lie, on three of them.

One shows which dimension of a copied parameter grows with the batch, the other runs with NaN in one
sample. Integers cannot be NaN, so each tensor of them has a twin of floats that can: it goes the
same way, and where it becomes floats (pixels divided by 255, a frozen table, one-hot) its NaN does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deepclean_hooks.persample import layout as layouts
from deepclean_hooks.persample.call import Call, mark
from deepclean_hooks.persample.forwards import Meetings, Pass
from deepclean_hooks.persample.layout import MARKED, Layout, Place
from deepclean_hooks.persample.owners import Owners
from deepclean_hooks.persample.rule import FusedRule, Rule

_TWIN = "_deepclean_twin"


class _Probing(Pass):
    """Serves nothing."""

    def serve(self, out: Tensor, rule: Rule) -> Tensor:
        return out

    def serve_fused(self, run: Callable[[Tensor], Tensor], x: Tensor, rule: FusedRule) -> Tensor:
        return run(x)

    def tap(self, value: Tensor, rule: Rule) -> Tensor:
        return value


class ShapePass(_Probing):
    """Notes the shapes of expanded parameters; run with two batch sizes, it shows which dimension
    is the batch."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.shapes: list[torch.Size] = []
        self.reads: list[int] = []

    def layout(self, x: Tensor) -> Layout:
        return Layout(0)

    def read(self, number: int | bool) -> None:
        if not isinstance(number, bool):
            self.reads.append(number)

    def expanded(self, call: Call) -> Any:
        out = call.func(*call.args, **call.kwargs)
        self.shapes.append(out.shape)
        return out


def batch_dimensions(few: ShapePass, more: ShapePass) -> list[int | None]:
    """For each expansion the dimension that grows with the batch, or None."""
    dimensions: list[int | None] = []
    for a, b in zip(few.shapes, more.shapes, strict=True):
        grown = [i for i, (p, q) in enumerate(zip(a, b, strict=True)) if p != q]
        scales = len(grown) == 1 and a[grown[0]] * more.n == b[grown[0]] * few.n
        dimensions.append(grown[0] if scales else None)
    return dimensions


class NaNPass(_Probing):
    """Runs with NaN in one sample and notes the layout of every tensor that a rule asks for."""

    every = True

    def __init__(self, n: int, expansions: list[int | None], reads: list[int]) -> None:
        super().__init__(n)
        self.seen = Meetings(expansions=expansions, reads=reads)

    def begin(self, call: Call) -> None:
        super().begin(call)
        self.seen.functions.append(call.func)
        self.seen.layouts.append([])

    def layout(self, x: Tensor) -> Place:
        layout = layouts.find(getattr(x, _TWIN, x), self.n)
        self.seen.layouts[-1].append((layout, x.shape))
        return Owners(self.n) if layout is None else layout

    def read(self, number: int | bool) -> None:
        """It may come from a NaN; those of the other pass count."""

    def passed(self, call: Call, out: Any) -> Any:
        """The output, NaN where that of the integers' twins is; integers get that as their twin."""
        if not any(hasattr(tensor, _TWIN) for tensor in call.tensors()):
            return out
        with torch.no_grad(), torch._C.DisableTorchFunction():
            twins = _twin_of_output(call, out)
        if isinstance(out, Tensor):
            return _joined(out, twins)
        if isinstance(out, list | tuple) and isinstance(twins, list | tuple):
            joined = [_joined(o, t) for o, t in zip(out, twins, strict=True)]
            return type(out)(joined) if type(out) in (list, tuple) else out
        return out

    def expanded(self, call: Call) -> Any:
        out = call.func(*call.args, **call.kwargs)
        dim = self.seen.expansions[self.expansions]
        self.expansions += 1
        if dim is None:
            return out
        copies: Tensor = out.detach().clone()
        place = Layout(dim).separated(copies, self.n)
        place.select(dim + 1, MARKED).fill_(float("nan"))
        mark(copies)
        return copies


def twin(tensor: Tensor) -> Tensor:
    """The tensor as floats, which can be NaN."""
    return tensor if tensor.is_floating_point() else tensor.detach().to(torch.float64)


def give_twins(tensors: Iterable[Tensor], twins: Iterable[Tensor]) -> None:
    """Gives each tensor of integers its twin, if that has a NaN."""
    for tensor, floats in zip(tensors, twins, strict=True):
        if not tensor.is_floating_point() and floats.isnan().any():
            setattr(tensor, _TWIN, floats)


def _twin_of_output(call: Call, out: Any) -> Any:
    """What the operation returns for the twins; None if that cannot be told."""
    twins: list[Tensor] = [getattr(t, _TWIN) for t in call.tensors() if hasattr(t, _TWIN)]
    try:
        result = call.with_data(lambda t: getattr(t, _TWIN, t.detach()))
    except Exception:  # it takes no floats: an index, a mask, a count of classes
        result = None
    if isinstance(out, list | tuple):
        return result
    if isinstance(result, Tensor) and result.is_floating_point() and result.shape == out.shape:
        return result
    for floats in twins:
        # Element by element (a comparison, a cast), or a vector for each (a table, one-hot).
        if isinstance(out, Tensor) and out.shape[: floats.dim()] == floats.shape:
            ones = [1] * (out.dim() - floats.dim())
            return floats.reshape(*floats.shape, *ones).expand(out.shape)
    return None


def _joined(out: Any, floats: Any) -> Any:
    if not isinstance(out, Tensor) or not isinstance(floats, Tensor) or not out.dim():
        return out
    if not floats.is_floating_point() or floats.shape != out.shape:
        return out
    if not out.dtype.is_floating_point:
        setattr(out, _TWIN, floats)
        return out
    return out.masked_fill(floats.isnan(), float("nan"))
