"""The forward passes under interception: two that find out where the samples lie, one that serves
the rules.

A meeting is an operation in which data meets parameters; meetings are numbered in the order of the
forward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepclean_hooks.persample import layout as layouts
from deepclean_hooks.persample.call import Call, Forward, flatten, kind, mark
from deepclean_hooks.persample.layout import Layout, Unserved
from deepclean_hooks.persample.rule import FusedRule, Rule
from deepclean_hooks.persample.rules.broadcast import Broadcast, Carrying


class ModelChanged(Exception):
    """The model's operations are not those of the probe: they depend on the data."""


@dataclass
class Meetings:
    """What the probe saw: for each meeting its function and the layouts its rule asked for, in
    order."""

    functions: list[Callable[..., Any]] = field(default_factory=list)
    layouts: list[list[Layout | None]] = field(default_factory=list)
    expansions: list[int | None] = field(default_factory=list)


class Pass(Forward):
    """A forward pass of n samples; counts its meetings and its expansions of parameters."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.meetings = 0
        self.expansions = 0

    def begin(self, call: Call) -> None:
        """A meeting starts."""
        self.meetings += 1

    def unserved(self, call: Call, reason: str) -> Any:
        """Runs an operation that no rule serves, its parameter side cut."""
        return call.with_parameters(lambda w: w.detach())

    @abstractmethod
    def expanded(self, call: Call) -> Any:
        """Runs an `expand`, `repeat` or the like of a parameter, which may copy it for each
        sample."""


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

    def layout(self, x: Tensor) -> Layout:
        return Layout(0)

    def expanded(self, call: Call) -> Any:
        out = call.func(*call.args, **call.kwargs)
        self.shapes.append(out.shape)
        return out


def batch_dimensions(one: ShapePass, other: ShapePass) -> list[int | None]:
    """For each expansion the dimension that grows with the batch, or None."""
    found: list[int | None] = []
    for a, b in zip(one.shapes, other.shapes, strict=True):
        grown = [i for i, (p, q) in enumerate(zip(a, b, strict=True)) if p != q]
        scales = len(grown) == 1 and a[grown[0]] * other.n == b[grown[0]] * one.n
        found.append(grown[0] if scales else None)
    return found


class NaNPass(_Probing):
    """Runs with NaN in one sample and notes the layout of every tensor that a rule asks for."""

    def __init__(self, n: int, expansions: list[int | None]) -> None:
        super().__init__(n)
        self.seen = Meetings(expansions=expansions)

    def begin(self, call: Call) -> None:
        super().begin(call)
        self.seen.functions.append(call.func)
        self.seen.layouts.append([])

    def layout(self, x: Tensor) -> Layout:
        found = layouts.find(x, self.n)
        self.seen.layouts[-1].append(found)
        if found is None:
            raise Unserved("the samples could not be told apart")
        return found

    def serve(self, out: Tensor, rule: Rule) -> Tensor:
        if not rule.saves_floats:  # an embedding of indices, which cannot be NaN themselves
            out = out.detach().clone()
            _fill(out, Layout(0), self.n)
        return out

    def expanded(self, call: Call) -> Any:
        out = call.func(*call.args, **call.kwargs)
        dim = self.seen.expansions[self.expansions]
        self.expansions += 1
        if dim is None:
            return out
        copies: Tensor = out.detach().clone()
        _fill(copies, Layout(dim), self.n)
        mark(copies)
        return copies


def _fill(tensor: Tensor, layout: Layout, n: int) -> None:
    layout.separated(tensor, n).select(layout.dim + 1, layouts.MARKED).fill_(float("nan"))


def _copied(operand: Tensor, copies: Tensor, n: int, layout: Layout) -> Rule:
    """The rule for a parameter copied for each sample: a broadcast if it is one, else the copies
    hold the samples."""
    own = (1,) * (copies.dim() - operand.dim()) + tuple(operand.shape)
    if all(p in (1, q) for p, q in zip(own, copies.shape, strict=True)):
        return Broadcast(operand, n, layout)
    return Carrying(copies, n, layout)


class _TapOperand(torch.autograd.Function):
    """Gives a detached operand a gradient, and hands that gradient on; nothing is accumulated
    anywhere."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, receive: Any) -> Tensor:
        ctx.receive = receive
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.receive(grad)
        return None, None, None


class _TapOutput(torch.autograd.Function):
    """Gives an output without a graph (the first layer's) a gradient; no copy, and safe before an
    in-place step."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, receive: Any) -> Tensor:
        ctx.receive = receive
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.receive(grad)
        return None, None, None


class _Fused(torch.autograd.Function):
    """An operation whose backward is its rule's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, run: Any, rule: FusedRule, receive: Any
    ) -> Any:
        ctx.rule, ctx.receive = rule, receive
        return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.no_grad():
            back = ctx.rule.input_gradient(grad, ctx.needs_input_grad[0])
        ctx.receive(grad)
        return back, None, None, None, None


@dataclass
class Use:
    """One rule at work in this forward pass; `index` counts them."""

    index: int
    rule: Rule


class ServedPass(Pass):
    """The pass that counts: every meeting is cut, and `receive(use, grad)` gets each output's
    gradient."""

    def __init__(
        self, n: int, seen: Meetings, anchor: Tensor, receive: Callable[[Use, Tensor], None]
    ) -> None:
        super().__init__(n)
        self.seen, self.anchor, self.receive = seen, anchor, receive
        self.uses: list[Use] = []
        self.refused: list[tuple[list[Tensor], str]] = []
        self._asked = 0

    def begin(self, call: Call) -> None:
        if self.meetings >= len(self.seen.functions) or (
            self.seen.functions[self.meetings] is not call.func
        ):
            raise ModelChanged(f"operation {self.meetings} is now {call.name}")
        super().begin(call)
        self._asked = 0

    def end(self) -> None:
        """Raises ModelChanged if the pass had fewer meetings than the probe."""
        if self.meetings != len(self.seen.functions):
            raise ModelChanged(f"{self.meetings} operations instead of {len(self.seen.functions)}")

    def layout(self, x: Tensor) -> Layout:
        asked = self.seen.layouts[self.meetings - 1]
        if self._asked >= len(asked):
            raise ModelChanged("an operation asked for another layout than in the probe")
        found = asked[self._asked]
        self._asked += 1
        if found is None:
            raise Unserved("the samples could not be told apart")
        return found

    def _use(self, rule: Rule) -> Callable[[Tensor], None]:
        use = Use(len(self.uses), rule)
        self.uses.append(use)
        return lambda grad: self.receive(use, grad)

    def serve(self, out: Tensor, rule: Rule) -> Tensor:
        receive = self._use(rule)
        if out.requires_grad:
            out.register_hook(receive)  # type: ignore[no-untyped-call]
            return out
        tapped: Tensor = _TapOutput.apply(out, self.anchor, receive)
        return tapped

    def serve_fused(self, run: Callable[[Tensor], Tensor], x: Tensor, rule: FusedRule) -> Tensor:
        out: Tensor = _Fused.apply(x, self.anchor, run, rule, self._use(rule))
        return out

    def tap(self, value: Tensor, rule: Rule) -> Tensor:
        tapped: Tensor = _TapOperand.apply(value, self.anchor, self._use(rule))
        return tapped

    def unserved(self, call: Call, reason: str) -> Any:
        sources = [t for t in flatten([call.args, call.kwargs]) if kind(t) and not call.is_data(t)]
        self.refused.append((sources, f"{call.name}: {reason}"))
        return super().unserved(call, reason)

    def expanded(self, call: Call) -> Any:
        index = self.expansions
        self.expansions += 1
        if index >= len(self.seen.expansions):
            raise ModelChanged("a parameter is expanded that the probe did not see")
        dim = self.seen.expansions[index]
        out = call.func(*call.args, **call.kwargs)
        if dim is None:
            return out
        copies = self.tap(out.detach(), _copied(call.args[0], out, self.n, Layout(dim)))
        mark(copies)
        return copies
