"""Sums of squared per-sample gradients from one forward and one backward of a batch.

The parameter side of every operation is cut, so autograd computes no ordinary weight gradient; a
rule for each operation turns its saved input and its output gradient into the sum of squares, at
the cost of the gradient it replaces. Exact: (d loss_n / d w)^2 for each sample n of its own, then
summed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.persample import probe
from deepclean_hooks.persample.accumulate import Sums
from deepclean_hooks.persample.forwards import (
    ImprovisedPass,
    ModelChanged,
    ServedPass,
    SharedRows,
    Use,
)
from deepclean_hooks.persample.intercept import Interception
from deepclean_hooks.persample.owners import OWNED_SAMPLES, Owners, Unowned, weights
from deepclean_hooks.persample.plan import Plan, classify
from deepclean_hooks.persample.planner import DEFAULT_MEMORY_BUDGET, Planner, Plans
from deepclean_hooks.persample.pullback import per_sample_through, squares_through
from deepclean_hooks.persample.rule import Carried, Into, Rule, Squares


class NonFiniteGradient(ValueError):
    """A squared gradient is NaN or infinite; `parameter` names where."""

    def __init__(self, parameter: str) -> None:
        super().__init__(f"the gradient of {parameter} is NaN or infinite")
        self.parameter = parameter


class SquaredGradients(Planner):
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
        super().__init__(model, parameters, loss_fn, memory_budget, plans)
        self.count = 0
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._sums = self._new_sums(dtype)
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
        for piece, part in _pieces(batch, left, self._most(plan)):
            self._add(piece, part, plan, self._sums)
        if self._sums.end_batch():
            self.require_finite()

    def _most(self, plan: Plan) -> int:
        """How many samples a piece of a batch may have."""
        most = max(1, self.memory_budget // max(1, plan.bytes_per_sample))
        return min(most, OWNED_SAMPLES) if plan.owned else most

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

    def _forward(self, batch: Batch, plan: Plan) -> tuple[ServedPass, Tensor]:
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
        try:
            self._add_whole(batch, counted, plan, sums, loops)
        except _InPieces as reason:  # comes before anything is added
            for piece, part in _pieces(batch, counted, reason.most):
                self._add(piece, part, plan, sums, loops)

    def _add_whole(self, batch: Batch, counted: int, plan: Plan, sums: Sums, loops: bool) -> None:
        padded = batch
        if batches.size(batch) == 1:
            # Padded with its own copy, whose loss is left out: see loop.squared_gradients for the
            # reason.
            padded = batches.rows(batch, torch.tensor([0, 0]))
        looped = {n: self.parameters[n] for n in plan.loop} if loops else {}
        if len(plan.loop) < len(self.parameters):
            try:
                with _alone(plan.unverified if loops else (), sums):
                    self._backward(padded, counted, plan, sums, fixed=not loops)
                    if loops and plan.unverified:
                        self._verify(batch, counted, plan, sums)
            except ModelChanged as reason:
                if not loops:
                    raise
                if self._improvised(padded, counted, plan, sums):
                    return
                looped = self.parameters
                self.notes.update(dict.fromkeys(self.parameters, f"in some batches: {reason}"))
        if looped:
            self._loop(batch, counted, looped, sums)

    def _loop(self, batch: Batch, counted: int, looped: Mapping[str, Tensor], sums: Sums) -> None:
        real = batches.rows(batch, torch.arange(counted))
        for name, squares in self._one_by_one(looped, real).items():
            sums.add(name, squares)

    def _require_same_operands(self, forward: ServedPass, plan: Plan) -> None:
        """Raises ModelChanged where another parameter stands than in the probe: an expert chosen by
        the data."""
        for use in forward.uses:
            for name, operand in use.rule.operands.items():
                expected = plan.sources.get((use.index, name))
                found = self._names.get(id(operand))
                if expected is None or (found is not None and expected != [found]):
                    raise ModelChanged(f"{found} is used where the probe saw {expected}")

    def _backward(self, batch: Batch, counted: int, plan: Plan, sums: Sums, fixed: bool) -> None:
        """`fixed`: the plan is of this very batch."""
        forward, loss = self._forward(batch, plan)
        self._require_same_operands(forward, plan)
        if forward.chosen and not fixed and plan.split():
            raise ModelChanged("the data may choose which entries of a parameter are used")
        if not self._weighed(forward, loss, counted, plan):
            self._squared(forward, loss, counted, plan, sums)
            return
        # A row of several samples shows in the middle: what was summed by then must not count.
        apart = self._new_sums(loss.dtype)
        self._squared(forward, loss, counted, plan, apart)
        for name in apart.added():
            sums.add(name, apart.take(name))

    def _improvised(self, batch: Batch, counted: int, plan: Plan, sums: Sums) -> bool:
        """Adds the squares of a batch whose operations are not those of the plan; False if it has
        to go to the loop.

        A parameter that met the data in this way in no batch before is compared with the loop.
        """
        forward = ImprovisedPass(batches.size(batch), self._anchor, self._ignore)
        with Interception(forward):
            loss = self.loss_fn(self.model, probe.marked(batch))
        loss = losses.per_sample(loss, forward.n)
        own = classify(forward.seen, forward.uses, forward.refused, loss, self.parameters)
        own.demote(plan.loop)
        if forward.n > max(2, self._most(own)):  # a single sample is shown twice
            raise _InPieces(self._most(own))
        apart = self._new_sums(loss.dtype)
        try:
            self._weighed(forward, loss, counted, own)
            self._squared(forward, loss, counted, own, apart)
        except SharedRows:
            return False
        new = {name for met in own.met(self.parameters) - plan.checked for name in met[2]}
        new -= own.loop.keys()
        if new:
            truth = self._one_by_one({n: self.parameters[n] for n in new}, batch, counted)
            errors = self._compared(apart.take, iter([truth]))
            largest = max(plan.largest, probe.largest(errors))
            wrong = probe.disagreements(errors, largest, plan.coarse)
            right = {name for name, (_, size, _) in errors.items() if size and name not in wrong}
            plan.checked |= {met for met in own.met(self.parameters) if set(met[2]) <= right}
            for name, squares in truth.items():
                sums.add(name, squares)
        for name in apart.added():
            sums.add(name, apart.take(name))
        looped = {n: self.parameters[n] for n in own.loop}
        if looped:
            for name in looped.keys() - plan.loop.keys():
                self.notes[name] = f"in some batches: {own.loop[name]}"
            self._loop(batch, counted, looped, sums)
        return True

    def _weighed(self, forward: ServedPass, loss: Tensor, counted: int, plan: Plan) -> bool:
        """Runs the backward of the weighed loss where it takes that to tell the samples apart."""
        planned = {index for index, _ in plan.fast | plan.pulled}
        owned = {
            use.index: use.rule.layout
            for use in forward.uses
            if isinstance(use.rule.layout, Owners) and use.index in planned
        }
        if not owned:
            return False
        plan.owned = True
        if forward.n > OWNED_SAMPLES:
            raise _InPieces(OWNED_SAMPLES)

        @torch.no_grad()
        def note(use: Use, grad: Tensor) -> None:
            if use.index in owned:
                owned[use.index].weigh(grad, use.rule.lead(grad))

        forward.receive = note
        total = (loss * weights(forward.n, loss))[:counted].sum()
        if total.requires_grad:
            torch.autograd.grad(total, self._anchor, allow_unused=True, retain_graph=True)
        return True

    def _squared(
        self, forward: ServedPass, loss: Tensor, counted: int, plan: Plan, sums: Sums
    ) -> None:
        later: list[
            tuple[Tensor, Tensor]
        ] = []  # (operand, its squares), to go back through a selection
        pulled: list[tuple[Tensor, Tensor | Carried]] = []  # (operand, its per-sample gradients)

        @torch.no_grad()
        def receive(use: Use, grad: Tensor) -> None:
            rule = use.rule
            fast = [name for name in rule.operands if (use.index, name) in plan.fast]
            slow = [name for name in rule.operands if (use.index, name) in plan.pulled]
            if isinstance(rule.layout, Owners) and (fast or slow):
                try:
                    rule.layout.settle(grad, rule.lead(grad))
                except Unowned as reason:
                    raise SharedRows(use.index) from reason
            direct = {k: self._names.get(id(rule.operands[k])) for k in fast}
            into = {k: sums.scratch[n] for k, n in direct.items() if n in sums.scratch}
            squared = self._squares(rule, grad.detach(), fast, into) if fast else {}
            for name, squares in squared.items():
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


class _InPieces(Exception):
    """The batch has more samples than a weighed backward tells apart, or memory holds: `most`."""

    def __init__(self, most: int) -> None:
        super().__init__(f"at most {most} samples")
        self.most = most


@contextmanager
def _alone(names: Collection[str], sums: Sums) -> Iterator[None]:
    """Inside, the sums of these parameters are of what is added inside."""
    apart = {name: sums.take(name) for name in sorted(names) if sums.any(name)}
    try:
        yield
    finally:
        for name, total in apart.items():
            sums.restore(name, total)


def _pieces(batch: Batch, counted: int, most: int) -> Iterator[tuple[Batch, int]]:
    """The batch in pieces of at most `most` samples, each with how many of its first samples
    count."""
    for piece in batches.split(batch, most):
        size = batches.size(piece)
        yield piece, min(counted, size)
        counted = max(0, counted - size)
