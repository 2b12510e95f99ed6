"""Sums of squared per-sample gradients from one forward and one backward of a batch.

The parameter side of every operation is cut, so autograd computes no ordinary weight gradient; a
rule for each operation turns its saved input and its output gradient into the sum of squares, at
the cost of the gradient it replaces. Exact: (d loss_n / d w)^2 for each sample n of its own, then
summed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deepclean_hooks import batches, losses
from deepclean_hooks.batches import Batch
from deepclean_hooks.losses import LossFn
from deepclean_hooks.persample import loop, probe
from deepclean_hooks.persample.accumulate import Sums
from deepclean_hooks.persample.forwards import Meetings, ModelChanged, ServedPass, Use
from deepclean_hooks.persample.intercept import Interception
from deepclean_hooks.persample.plan import Plan, classify
from deepclean_hooks.persample.pullback import per_sample_through, squares_through
from deepclean_hooks.persample.rule import Carried

Plans = dict[object, Plan]
"""(Form of a batch, names of the parameters, loss) -> plan; all of one model."""

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
        self._sums = Sums(self.parameters, dtype)
        self._plans: Plans = {} if plans is None else plans
        self.computed = str(self._first().dtype).removeprefix("torch.")
        self._anchor = torch.zeros((), requires_grad=True, device=self._first().device)

    def _first(self) -> Tensor:
        return next(iter(self.parameters.values()))

    def add(self, batch: Batch) -> None:
        """Adds the squared gradients of every sample of a batch.

        Raises ValueError for a bad loss, label or batch, NonFiniteGradient (within 16 batches) for
        a bad gradient.
        """
        plan = self.plan_for(batch)
        most = max(1, self.memory_budget // max(1, plan.bytes_per_sample))
        for piece in batches.split(batch, most):
            self._add(piece, plan, self._sums)
        self.count += batches.size(batch)
        if self._sums.end_batch():
            self.require_finite()

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
        shapes = tuple((t.shape[1:], t.dtype) for t in batches.tensors(batch))
        form = (shapes, frozenset(self.parameters), self.loss_fn)
        if form not in self._plans:
            self._plans[form] = self._make_plan(batch)
        self.notes.update(self._plans[form].loop)
        return self._plans[form]

    def _make_plan(self, batch: Batch) -> Plan:
        few = probe.samples(batch, probe.PROBE_SAMPLES)
        # Without interception first: what is wrong with the user's data or model comes as it is.
        losses.per_sample(self.loss_fn(self.model, few), probe.PROBE_SAMPLES)
        try:
            seen = probe.meetings(self.model, self.loss_fn, batch)
            served, loss = self._forward(few, Plan(seen))
            plan = classify(seen, served.uses, served.refused, loss, self.parameters)
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
        trial = Sums(self.parameters, self._first().dtype)
        try:
            self._add(few, plan, trial, loops=False)
        except Exception as reason:
            plan.demote(dict.fromkeys(checked, f"self-check: {reason}"))
            return
        truth = (
            loop.squared_gradients(self.model, group, self.loss_fn, few)
            for group in probe.groups(checked, self.memory_budget)
        )
        plan.demote(probe.disagreements(trial.take, truth))

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

    def _add(self, batch: Batch, plan: Plan, sums: Sums, loops: bool = True) -> None:
        count = batches.size(batch)
        if count == 1:
            # Padded with its own copy, whose loss is left out: see loop.squared_gradients for the
            # reason.
            batch = batches.rows(batch, torch.tensor([0, 0]))
        looped = {n: self.parameters[n] for n in plan.loop} if loops else {}
        if len(plan.loop) < len(self.parameters):
            try:
                self._backward(batch, count, plan, sums)
            except ModelChanged as reason:
                if not loops:
                    raise RuntimeError(str(reason)) from reason
                looped = self.parameters
                self.notes.update(dict.fromkeys(self.parameters, f"in some batches: {reason}"))
        if looped:
            real = batches.rows(batch, torch.arange(count))
            for name, squares in loop.squared_gradients(
                self.model, looped, self.loss_fn, real
            ).items():
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

    def _backward(self, batch: Batch, count: int, plan: Plan, sums: Sums) -> None:
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
            for name, squares in rule.squares(grad.detach(), fast, into).items() if fast else ():
                operand, parameter = rule.operands[name], direct[name]
                if parameter is not None:
                    sums.add(parameter, squares)
                else:
                    value = squares if isinstance(squares, Tensor) else squares.value()
                    later.append((operand, value))
            for name, each in rule.per_sample(grad.detach(), slow).items() if slow else ():
                pulled.append((rule.operands[name], each))
            rule.free()

        forward.receive = receive
        total = loss[:count].sum()
        if total.requires_grad:
            torch.autograd.grad(total, self._anchor, allow_unused=True)
        for operand, squares in later:
            for name, back in squares_through(operand, squares, self.parameters, self._names):
                sums.add(name, back)
        wanted = {n: self.parameters[n] for n in plan.pulled_parameters}
        for name, each in per_sample_through(pulled, wanted, self._names, forward.n).items():
            sums.add(name, each.square().sum(0))
