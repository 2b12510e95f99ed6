"""The forward pass under interception that serves the rules, and what it knows from the probe.

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

from deepclean_hooks.persample.call import Call, Forward, kind, mark
from deepclean_hooks.persample.layout import PROBE_SAMPLES, Layout, Place
from deepclean_hooks.persample.owners import Owners
from deepclean_hooks.persample.rule import FusedRule, Rule
from deepclean_hooks.persample.rules.broadcast import Broadcast, Carrying


class ModelChanged(Exception):
    """The model's operations are not those of the probe: they depend on the data."""


class SharedRows(ModelChanged):
    """Rows of an operation's gradient belong to several samples; `use` is its number."""

    def __init__(self, use: int) -> None:
        super().__init__("some rows belong to several samples")
        self.use = use


class WrittenInPlace(Exception):
    """Data is written into a tensor made of parameters: no cut can be made there."""


def writes_in_place(name: str) -> bool:
    """Whether a torch function of this name changes its first argument."""
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__invert__", "__index__", "__int__")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


@dataclass
class Meetings:
    """What the probe saw: for each meeting its function and the layouts its rule asked for, in
    order, each with the shape of its tensor; and the integers read from the data.

    `apart`: whether one sample's NaN stayed in that sample; without it no layout is known.
    `doubted`: places of meetings and expansions whose layout the self-check found to be wrong.
    """

    functions: list[Callable[..., Any]] = field(default_factory=list)
    layouts: list[list[tuple[Layout | None, torch.Size]]] = field(default_factory=list)
    expansions: list[int | None] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    apart: bool = True
    doubted: set[tuple[str, int]] = field(default_factory=set)


class Pass(Forward):
    """A forward pass of n samples; counts its meetings and its expansions of parameters."""

    every = False  # whether `passed` wants to see every operation on the data

    def __init__(self, n: int) -> None:
        self.n = n
        self.meetings = 0
        self.expansions = 0
        self.branched = False  # whether the data became a number or a truth value of Python's
        self.chosen = False  # whether a meeting came after that: the loss looks at labels, later
        self.wanders = False  # rows were moved by what the data is: no layout holds from there on

    def begin(self, call: Call) -> None:
        """A meeting starts."""
        self.meetings += 1
        self.chosen |= self.branched

    def unserved(self, call: Call, reason: str) -> Any:
        """Runs an operation that no rule serves, its parameter side cut."""
        if writes_in_place(call.name) and call.is_parameter(call.args[0]):
            # The data would be in it without a history.
            raise WrittenInPlace(f"{call.name} writes data into what is made of parameters")
        return call.with_parameters(lambda w: w.detach())

    @abstractmethod
    def read(self, number: int | bool) -> None:
        """A value of the data became a number of Python's."""

    def passed(self, call: Call, out: Any) -> Any:
        """What an operation on the data returns, or what is to go on in its place."""
        return out

    @abstractmethod
    def expanded(self, call: Call) -> Any:
        """Runs an `expand`, `repeat` or the like of a parameter, which may copy it for each
        sample."""


def _copied(operand: Tensor, copies: Tensor, n: int, layout: Place) -> Rule:
    """The rule for a parameter copied for each sample: a broadcast if it is one, else the copies
    hold the samples."""
    own = (1,) * (copies.dim() - operand.dim()) + tuple(operand.shape)
    if all(p in (1, q) for p, q in zip(own, copies.shape, strict=True)):
        return Broadcast(operand, n, layout)
    return Carrying(copies, n, layout)


def _no_view(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd does not know as a view: an in-place step on a
    view gives it another history, in which a hook on the old one is lost."""
    alias: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return alias


class _TapOperand(torch.autograd.Function):
    """Gives a detached operand a gradient, and hands that gradient on; nothing is accumulated
    anywhere."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, receive: Any) -> Tensor:
        ctx.receive = receive
        return _no_view(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.receive(grad)
        return None, None, None


class _TapOutput(_TapOperand):
    """Gives an output without a graph (the first layer's) a gradient; no copy, and safe before an
    in-place step."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, receive: Any) -> Tensor:
        ctx.receive = receive
        ctx.mark_dirty(out)
        return out


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
    """One rule at work in this forward pass; `index` counts them, `place` is the meeting or the
    expansion that it serves."""

    index: int
    rule: Rule
    place: tuple[str, int]


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
        self.dtypes: set[torch.dtype] = set()  # in which parameters met the data
        self._asked = self._read = 0
        self._place = ("meeting", 0)

    def begin(self, call: Call) -> None:
        if self.meetings >= len(self.seen.functions) or (
            self.seen.functions[self.meetings] is not call.func
        ):
            raise ModelChanged(f"operation {self.meetings} is now {call.name}")
        self._place = ("meeting", self.meetings)
        super().begin(call)
        self._asked = 0

    def end(self) -> None:
        """Raises ModelChanged if the pass had fewer meetings than the probe."""
        if self.meetings != len(self.seen.functions):
            raise ModelChanged(f"{self.meetings} operations instead of {len(self.seen.functions)}")

    def layout(self, x: Tensor) -> Place:
        asked = self.seen.layouts[self.meetings - 1]
        if self._asked >= len(asked):
            raise ModelChanged("an operation asked for another layout than in the probe")
        layout, shape = asked[self._asked]
        self._asked += 1
        if layout is None or self._place in self.seen.doubted:
            return self._unknown()
        if self.wanders or layout.scaled(shape, PROBE_SAMPLES, self.n) != x.shape:
            return self._moved()
        return layout

    def _unknown(self) -> Place:
        """For a tensor in which the probe could not tell the samples apart."""
        return Owners(self.n)

    def _moved(self) -> Place:
        """For a tensor whose rows are not those of the probe's layout."""
        return Owners(self.n)

    def read(self, number: int | bool) -> None:
        if isinstance(number, bool):  # what follows shows in the operations
            return
        at, self._read = self._read, self._read + 1
        if self.seen.reads[at : at + 1] != [number]:
            self.wanders = True

    def _use(self, rule: Rule) -> Callable[[Tensor], None]:
        use = Use(len(self.uses), rule, self._place)
        self.uses.append(use)
        return lambda grad: self.receive(use, grad)

    def serve(self, out: Tensor, rule: Rule) -> Tensor:
        self.dtypes.add(out.dtype)
        receive = self._use(rule)
        if out._is_view():
            out = _no_view(out)
        if out.requires_grad:
            out.register_hook(receive)  # type: ignore[no-untyped-call]
            return out
        tapped: Tensor = _TapOutput.apply(out, self.anchor, receive)
        return tapped

    def serve_fused(self, run: Callable[[Tensor], Tensor], x: Tensor, rule: FusedRule) -> Tensor:
        out: Tensor = _Fused.apply(x, self.anchor, run, rule, self._use(rule))
        return out

    def tap(self, value: Tensor, rule: Rule) -> Tensor:
        self.dtypes.add(value.dtype)
        tapped: Tensor = _TapOperand.apply(value, self.anchor, self._use(rule))
        return tapped

    def unserved(self, call: Call, reason: str) -> Any:
        sources = [t for t in call.tensors() if kind(t) and not call.is_data(t)]
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
        self._place = ("expansion", index)
        place: Place = Layout(dim)
        if not self.seen.apart or self._place in self.seen.doubted:
            place = self._unknown()
        elif self.wanders:
            place = self._moved()
        copies = self.tap(out.detach(), _copied(call.args[0], out, self.n, place))
        mark(copies)
        return copies


class ImprovisedPass(ServedPass):
    """Serves a batch whose operations are not the probe's: no layout is known, so all samples are
    told apart in the backward."""

    def __init__(self, n: int, anchor: Tensor, receive: Callable[[Use, Tensor], None]) -> None:
        super().__init__(n, Meetings(), anchor, receive)

    def begin(self, call: Call) -> None:
        Pass.begin(self, call)

    def layout(self, x: Tensor) -> Place:
        return Owners(self.n)

    def read(self, number: int | bool) -> None:
        """It says nothing here."""

    def expanded(self, call: Call) -> Any:
        return call.func(*call.args, **call.kwargs)  # pulled back where it meets the data
