"""Sums of squared per-sample gradients from one forward and one backward of a batch.

The parameter side of every operation is cut, so autograd computes no ordinary weight gradient; a
rule for each operation turns its saved input and its output gradient into the sum of squares, at
the cost of the gradient it replaces. Exact: (d loss_n / d w)^2 for each sample n of its own, then
summed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.persample import loop, probe
from deepclean_hooks.persample.accumulate import Sums
from deepclean_hooks.persample.forwards import Meetings, ModelChanged, ServedPass, Use
from deepclean_hooks.persample.intercept import Interception
from deepclean_hooks.persample.plan import Plan, classify
from deepclean_hooks.persample.pullback import per_sample_through, squares_through
from deepclean_hooks.persample.rule import Carried, Into, Rule, Squares

Plans = dict[object, Plan]
"""(Form of a batch, names of the parameters, weak reference to the loss) -> plan; all of one
model."""

DEFAULT_MEMORY_BUDGET = 2**28  # bytes of per-sample gradients held at once


class NonFiniteGradient(ValueError):
    """A squared gradient is NaN or infinite; `parameter` names where."""

    def __init__(self, parameter: str) -> None:
        super().__init__(f"the gradient of {parameter} is NaN or infinite")
        self.parameter = parameter


class SquaredGradients:
    """Adds up the squared per-sample gradients of `parameters` of a model in eval mode, batch by
    batch.

    `memory_budget`: bytes for per-sample gradients beyond a plain forward and backward; where tied
    or derived parameters need more, a batch is taken in pieces. `plans`, if given, are those of an
    earlier pass over the same model, used and added to. The model must be the unwrapped one, inside
    `measure.no_trace`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        loss_fn: LossFn = losses.cross_entropy,
        dtype: torch.dtype = torch.float64,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        plans: Plans | None = None,
    ) -> None:
        self.model, self.parameters, self.loss_fn = model, dict(parameters), loss_fn
        self.memory_budget = memory_budget
        self.count = 0
        self.notes: dict[str, str] = {}  # parameter -> why it needs the one-sample loop
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._sums = self._new_sums(dtype)
        self._plans: Plans = {} if plans is None else plans
        self.computed = str(self._first().dtype).removeprefix("torch.")
        self._anchor = torch.zeros((), requires_grad=True, device=self._first().device)

    def _first(self) -> Tensor:
        return next(iter(self.parameters.values()))

    def _new_sums(self, dtype: torch.dtype) -> Sums:
        return Sums(self.parameters, dtype)

    def add(self, batch: Batch, counted: int | None = None) -> None:
        """Adds the squared gradients of the first `counted` samples of a batch, of all by default.

        Raises ValueError for a bad loss, label or batch, NonFiniteGradient (within 16 batches) for
        a bad gradient.
        """
        plan = self.plan_for(batch)
        left = batches.size(batch) if counted is None else counted
        self.count += left
        for piece in batches.split(batch, self._most(plan)):
            size = batches.size(piece)
            self._add(piece, min(left, size), plan, self._sums)
            left = max(0, left - size)
        if self._sums.end_batch():
            self.require_finite()

    def _most(self, plan: Plan) -> int:
        """How many samples a piece of a batch may have."""
        return max(1, self.memory_budget // max(1, plan.bytes_per_sample))

    def totals(self) -> dict[str, Tensor]:
        """The sums of squares by name, in the accumulation's dtype."""
        self._sums.flush()
        self.require_finite()
        return self._sums.totals()

    def require_finite(self) -> None:
        """Raises NonFiniteGradient if a sum is NaN or infinite."""
        for name, total in self._sums.totals().items():
            if not torch.isfinite(total.sum()):
                raise NonFiniteGradient(name)

    def plan_for(self, batch: Batch) -> Plan:
        """The plan for batches of this form: made, and checked against the one-sample loop, at its
        first sight."""
        form = self._form(batch)
        if form not in self._plans:
            self._plans[form] = self._make_plan(batch)
        self.notes.update(self._plans[form].loop)
        return self._plans[form]

    def _form(self, batch: Batch) -> object:
        shapes = tuple((t.shape[1:], t.dtype) for t in batches.tensors(batch))
        return shapes, frozenset(self.parameters), _reference(self.loss_fn)

    def _require_loss(self, few: Batch) -> None:
        losses.per_sample(self.loss_fn(self.model, few), probe.PROBE_SAMPLES)

    def _make_plan(self, batch: Batch) -> Plan:
        few = probe.samples(batch, probe.PROBE_SAMPLES)
        # Without interception first: what is wrong with the user's data or model comes as it is.
        self._require_loss(few)
        try:
            seen = probe.meetings(self.model, self.loss_fn, batch)
            served, loss = self._forward(few, Plan(seen))
            plan = classify(seen, served.uses, served.refused, loss, self.parameters, self._present)
        except probe.SamplesMixed:
            raise
        except Exception as reason:  # whatever it is, the one-sample loop needs no interception
            plan = Plan(Meetings())
            why = f"it could not be probed: {type(reason).__name__}: {reason}"
            plan.demote(dict.fromkeys(self.parameters, why))
        self._self_check(few, plan)
        return plan

    def _self_check(self, few: Batch, plan: Plan) -> None:
        """Compares with the one-sample loop on a few samples; what differs goes to the loop."""
        checked = {n: p for n, p in self.parameters.items() if n not in plan.loop}
        if not checked:
            return
        trial = self._new_sums(self._first().dtype)
        try:
            self._add(few, probe.PROBE_SAMPLES, plan, trial, loops=False)
        except Exception as reason:
            plan.demote(dict.fromkeys(checked, f"self-check: {reason}"))
            return
        truth = (
            self._one_by_one(group, few) for group in probe.groups(checked, self._group_bytes())
        )
        plan.demote(self._disagreements(trial.take, truth))

    def _group_bytes(self) -> int:
        """Of parameters whose whole gradients are held at a time."""
        return self.memory_budget

    def _disagreements(
        self, take: Callable[[str], Tensor], truth: Iterator[dict[str, Tensor]]
    ) -> dict[str, str]:
        return probe.disagreements(take, truth)

    def _present(self, names: Collection[str]) -> AbstractContextManager[None]:
        """Inside, the values of these parameters can be read; always, unless they are sharded."""
        return nullcontext()

    def _forward(self, batch: Batch, plan: Plan) -> tuple[ServedPass, Tensor]:
        """A served forward pass of the batch: the pass with its uses, and the loss of each
        sample."""
        count = batches.size(batch)
        forward = ServedPass(count, plan.seen, self._anchor, self._ignore)
        marked = probe.marked(batch)
        with Interception(forward):
            loss = self.loss_fn(self.model, marked)
        forward.end()
        return forward, losses.per_sample(loss, count)

    @staticmethod
    def _ignore(use: Use, grad: Tensor) -> None:
        """Before a plan exists nothing is done with a gradient."""

    def _add(self, batch: Batch, counted: int, plan: Plan, sums: Sums, loops: bool = True) -> None:
        padded = batch
        if batches.size(batch) == 1:
            # Padded with its own copy, whose loss is left out: see loop.squared_gradients for the
            # reason.
            padded = batches.rows(batch, torch.tensor([0, 0]))
        looped = {n: self.parameters[n] for n in plan.loop} if loops else {}
        if len(plan.loop) < len(self.parameters):
            try:
                self._backward(padded, counted, plan, sums)
            except ModelChanged as reason:
                if not loops:
                    raise RuntimeError(str(reason)) from reason
                looped = self.parameters
                self.notes.update(dict.fromkeys(self.parameters, f"in some batches: {reason}"))
        if looped:
            self._loop(batch, counted, looped, sums)

    def _loop(self, batch: Batch, counted: int, looped: Mapping[str, Tensor], sums: Sums) -> None:
        real = batches.rows(batch, torch.arange(counted))
        for name, squares in self._one_by_one(looped, real).items():
            sums.add(name, squares)

    def _one_by_one(
        self, group: Mapping[str, Tensor], batch: Batch, counted: int | None = None
    ) -> dict[str, Tensor]:
        return loop.squared_gradients(self.model, group, self.loss_fn, batch, counted)

    def _require_same_operands(self, forward: ServedPass, plan: Plan) -> None:
        """Raises ModelChanged where another parameter stands than in the probe: an expert chosen by
        the data."""
        for use in forward.uses:
            for name, operand in use.rule.operands.items():
                expected = plan.sources.get((use.index, name))
                found = self._names.get(id(operand))
                if expected is None or (found is not None and expected != [found]):
                    raise ModelChanged(f"{found} is used where the probe saw {expected}")

    def _backward(self, batch: Batch, counted: int, plan: Plan, sums: Sums) -> None:
        forward, loss = self._forward(batch, plan)
        self._require_same_operands(forward, plan)
        later: list[
            tuple[Tensor, Tensor]
        ] = []  # (operand, its squares), to go back through a selection
        pulled: list[tuple[Tensor, Tensor | Carried]] = []  # (operand, its per-sample gradients)

        @torch.no_grad()
        def receive(use: Use, grad: Tensor) -> None:
            rule = use.rule
            fast = [name for name in rule.operands if (use.index, name) in plan.fast]
            slow = [name for name in rule.operands if (use.index, name) in plan.pulled]
            direct = {k: self._names.get(id(rule.operands[k])) for k in fast}
            into = {k: sums.scratch[n] for k, n in direct.items() if n in sums.scratch}
            found = self._squares(rule, grad.detach(), fast, into) if fast else {}
            for name, squares in found.items():
                operand, parameter = rule.operands[name], direct[name]
                if parameter is not None:
                    sums.add(parameter, squares)
                else:
                    value = squares if isinstance(squares, Tensor) else squares.value()
                    if not self._at_once(operand, value, sums):
                        later.append((operand, value))
            each_of = self._per_sample(rule, grad.detach(), slow) if slow else {}
            pulled.extend((rule.operands[name], each) for name, each in each_of.items())
            rule.free()

        forward.receive = receive
        total = loss[:counted].sum()
        if total.requires_grad:
            torch.autograd.grad(total, self._anchor, allow_unused=True)
        self._pull_back(later, pulled, plan, forward.n, sums)

    def _at_once(self, operand: Tensor, squares: Tensor, sums: Sums) -> bool:
        """Whether the squares of an operand that was made of a parameter are added already."""
        return False

    def _squares(self, rule: Rule, grad: Tensor, names: Collection[str], into: Into) -> Squares:
        return rule.squares(grad, names, into)

    def _per_sample(
        self, rule: Rule, grad: Tensor, names: Collection[str]
    ) -> dict[str, Tensor | Carried]:
        return rule.per_sample(grad, names)

    def _pull_back(
        self,
        later: list[tuple[Tensor, Tensor]],
        pulled: list[tuple[Tensor, Tensor | Carried]],
        plan: Plan,
        n: int,
        sums: Sums,
    ) -> None:
        """From operands back to the parameters that they were made of."""
        for operand, squares in later:
            for name, back in squares_through(operand, squares, self.parameters, self._names):
                sums.add(name, back)
        wanted = {n: self.parameters[n] for n in plan.pulled_parameters}
        for name, each in per_sample_through(pulled, wanted, self._names, n).items():
            sums.add(name, each.square().sum(0))


def _reference(loss_fn: LossFn) -> object:
    """What tells a loss from others without keeping it: it may hold the model that plans are of."""
    try:
        found = WeakMethod(loss_fn) if isinstance(loss_fn, MethodType) else ref(loss_fn)
        hash(found)
        return found
    except TypeError:  # a dataclass, or a class with __slots__ without room for weak references
        return _Itself(loss_fn)


class _Itself:
    """Equal to that of the same object only, whatever that object says of itself; keeps it."""

    def __init__(self, one: object) -> None:
        self.one = one

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.one is self.one

    def __hash__(self) -> int:
        return id(self.one)
