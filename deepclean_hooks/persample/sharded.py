"""The squared per-sample gradients of a model under FSDP2; their sums are sharded as it is.

FSDP2 averages a batch's gradients over the ranks, which is too late for a square. The engine cuts
parameters off, so FSDP2 finds no gradient to average; what the rules make of a layer is summed over
the ranks at once and each keeps its shard: no rank holds more than one layer whole. Every rank runs
the same passes in the same order, of batches of one size; what differs is how many samples count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.persample import loop, probe
from deepclean_hooks.persample.accumulate import FLUSH_EVERY, Sums, add_converted
from deepclean_hooks.persample.call import Call, notes
from deepclean_hooks.persample.engine import NonFiniteGradient, SquaredGradients
from deepclean_hooks.persample.forwards import Meetings, ModelChanged, ServedPass
from deepclean_hooks.persample.intercept import Interception
from deepclean_hooks.persample.layout import Place, Unserved
from deepclean_hooks.persample.outer import Product
from deepclean_hooks.persample.plan import Plan, leaves
from deepclean_hooks.persample.planner import DEFAULT_MEMORY_BUDGET, Plans
from deepclean_hooks.persample.pullback import per_sample_through, squares_through
from deepclean_hooks.persample.rule import Carried, Into, Rule, Squares
from deepclean_hooks.ranks import fsdp, shards


class ShardedSums(Sums):
    """One sum for each parameter, of which this rank keeps its shard; every `add` is a collective.

    `like`: the sharded parameters. Those that no rank shares are summed on each rank for itself.
    """

    def __init__(self, like: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(like, dtype)
        self._like, self._kept, self._added = like, dtype, 0
        self._parts: dict[str, Tensor] = {}

    def add(self, name: str, squares: Tensor | Product) -> None:
        """Adds a sum of squares of the (whole) parameter's shape; a product may be flat."""
        value = squares if isinstance(squares, Tensor) else squares.value()
        like = self._like[name]
        here = shards.summed_part(value.detach().reshape(like.shape), like)
        add_converted(self._part(name), here)

    def end_batch(self) -> bool:
        """Counts a batch; returns whether it is time to look at the sums."""
        self._added += 1
        return self._added % FLUSH_EVERY == 0

    def flush(self) -> None:
        """Nothing waits here."""

    def any(self, name: str) -> bool:
        """Whether this rank's part of a sum has an entry that is not 0."""
        return bool(self._part(name).any())

    def restore(self, name: str, total: Tensor) -> None:
        """Adds this rank's part, as `take` gave it up."""
        self._part(name).add_(total)

    def take(self, name: str) -> Tensor:
        """This rank's part of one sum, which is no longer kept here afterwards."""
        part = self._part(name)
        del self._parts[name]
        return part

    def totals(self) -> dict[str, Tensor]:
        """This rank's part of every sum."""
        return {name: self._part(name) for name in self._like}

    def _part(self, name: str) -> Tensor:
        if name not in self._parts:
            here = shards.local(self._like[name])
            self._parts[name] = torch.zeros_like(here, dtype=self._kept, requires_grad=False)
        return self._parts[name]


class _PatientPass(ServedPass):
    """Goes on, unserved, after an operation that is not the probe's: a pass that broke off on one
    rank would leave the others waiting at the next layer."""

    changed: str | None = None

    def begin(self, call: Call) -> None:
        self._patiently(lambda: super(_PatientPass, self).begin(call))

    def layout(self, x: Tensor) -> Place:
        place: Place = self._patiently(lambda: super(_PatientPass, self).layout(x))
        return place

    def _unknown(self) -> Place:
        # Two backward passes would have to be the same on all ranks.
        raise Unserved("the samples could not be told apart")

    def _moved(self) -> Place:
        raise ModelChanged("the rows of an operation do not match its samples as in the probe")

    def expanded(self, call: Call) -> Any:
        try:
            return self._patiently(lambda: super(_PatientPass, self).expanded(call))
        except Unserved:
            return call.func(*call.args, **call.kwargs)

    def end(self) -> None:
        try:
            super().end()
        except ModelChanged as reason:
            self.changed = self.changed or str(reason)

    def _patiently(self, step: Callable[[], Any]) -> Any:
        if self.changed is None:
            try:
                return step()
            except ModelChanged as reason:
                self.changed = str(reason)
        raise Unserved(self.changed)


class ShardedSquaredGradients(SquaredGradients):
    """`SquaredGradients` of a model under FSDP2, of which all ranks make one and add batches of the
    same size together.

    `parameters` are the sharded ones. Whatever a rank finds out about the model or its data, it
    tells the others before the next pass: they raise together, and take the same way together.
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
        self._unsharded = fsdp.Unsharded(model)
        self._like = {name: self._unsharded.sharded[name] for name in parameters}
        self._failure: Exception | None = None
        super().__init__(
            model,
            {name: self._unsharded.parameters[name] for name in parameters},
            loss_fn=loss_fn,
            dtype=dtype,
            memory_budget=memory_budget,
            plans=plans,
        )

    def _new_sums(self, dtype: torch.dtype) -> Sums:
        return ShardedSums(self._like, dtype)

    def add(self, batch: Batch, counted: int | None = None) -> None:
        """Adds the squared gradients of the first `counted` samples of a batch, of all by default;
        every rank adds a batch of the same size."""
        with self._unsharded.around_forward(_noted, _as_before):
            super().add(batch, counted)

    def totals(self) -> dict[str, Tensor]:
        """The sums of squares by name, sharded as the parameters are."""
        parts = super().totals()
        return {name: shards.sharded_as(part, self._like[name]) for name, part in parts.items()}

    def require_finite(self) -> None:
        """Raises NonFiniteGradient on all ranks if a sum is NaN or infinite on one."""
        bad: str | None = None
        try:
            super().require_finite()
        except NonFiniteGradient as reason:
            bad = reason.parameter
        for name in ranks.gather(bad):
            if name is not None:
                raise NonFiniteGradient(name)

    # ------------------------------------------------------------------ one plan for all ranks

    def plan_for(self, batch: Batch) -> Plan:
        """The plan for batches of this form, made by all ranks as soon as one of them needs it."""
        form = self._form(batch)
        if any(ranks.gather(form not in self._plans)):
            self._plans[form] = self._make_plan(batch)
        self.notes.update(self._plans[form].loop)
        return self._plans[form]

    def _first_loss(self, few: Batch) -> tuple[Tensor, bool]:
        with ranks.fail_together():
            return super()._first_loss(few)

    def _agreed(self, condition: bool) -> bool:
        return any(ranks.gather(condition))

    def _awake(self, names: Collection[str], sums: Sums) -> list[str]:
        everyone = ranks.gather(super()._awake(names, sums))
        return sorted({name for part in everyone for name in part})

    def _make_plan(self, batch: Batch) -> Plan:
        try:
            plan = super()._make_plan(batch)
        finally:
            fsdp.settle(self.model)
        return self._same_on_ranks(plan)

    def _classified(self, few: Batch, seen: Meetings) -> Plan:
        # Before the self-check, whose sums are collectives.
        return self._same_on_ranks(super()._classified(few, seen))

    def _same_on_ranks(self, plan: Plan) -> Plan:
        ways = sorted(plan.fast), sorted(plan.pulled), sorted(plan.sources.items())
        everyone = ranks.gather((ways, plan.loop))
        reasons: dict[str, str] = {}
        for _, loops in everyone:
            reasons.update(loops)
        if any(other != everyone[0][0] for other, _ in everyone):
            why = "the operations differ between ranks"
            reasons = {**dict.fromkeys(self.parameters, why), **reasons}
        plan.demote(reasons)
        return plan

    def _self_check(self, few: Batch, plan: Plan) -> set[str]:
        fsdp.settle(self.model)  # the passes of the probe had no backward
        super()._self_check(few, plan)
        return set()  # samples are not told apart in the backward: nothing is tried again

    def _group_bytes(self) -> int:
        # A gradient and its squares then take no more room than this rank's share of the weights.
        everything = sum(p.numel() * p.element_size() for p in self.parameters.values())
        return min(self.memory_budget, everything // (2 * ranks.world()[1]))

    def _compared(
        self, take: Callable[[str], Tensor], truth: Iterator[dict[str, Tensor]]
    ) -> probe.Errors:
        parts = (
            {name: shards.summed_part(one, self._like[name]) for name, one in group.items()}
            for group in truth
        )
        return _worst_over_ranks(probe.compared(take, parts))

    def _most(self, plan: Plan) -> int:
        return min(ranks.gather(super()._most(plan)))

    # ------------------------------------------------------------------ the same passes

    def _forward(self, batch: Batch, plan: Plan) -> tuple[ServedPass, Tensor]:
        count = batches.size(batch)
        forward = _PatientPass(count, plan.seen, self._anchor, self._ignore)
        marked = probe.marked(batch)
        with ranks.fail_together():
            with Interception(forward):
                loss = self.loss_fn(self.model, marked)
            forward.end()
            each = losses.per_sample(loss, count)
        self._change_together(forward.changed)
        return forward, each

    def _require_same_operands(self, forward: ServedPass, plan: Plan) -> None:
        changed: str | None = None
        try:
            super()._require_same_operands(forward, plan)
        except ModelChanged as reason:
            changed = str(reason)
        self._change_together(changed)

    def _change_together(self, changed: str | None) -> None:
        told = [one for one in ranks.gather(changed) if one is not None]
        if told:
            fsdp.settle(self.model)
            raise ModelChanged(told[0])

    def _improvised(self, batch: Batch, counted: int, plan: Plan, sums: Sums) -> bool:
        return False  # samples are not told apart in the backward on several ranks

    def _loop(self, batch: Batch, counted: int, looped: Mapping[str, Tensor], sums: Sums) -> None:
        # In one order on all ranks: each learned of the loop's parameters in an order of its own.
        alike = {name: looped[name] for name in sorted(looped)}
        for group in probe.groups(alike, self._group_bytes()):
            found = self._one_by_one(group, batch, counted)
            for name, squares in found.items():
                sums.add(name, squares)

    def _one_by_one(
        self, group: Mapping[str, Tensor], batch: Batch, counted: int | None = None
    ) -> dict[str, Tensor]:
        def beside(loss: Tensor) -> list[Tensor]:
            return self._unsharded.one_of_each(leaves(loss, self._names))

        return loop.squared_gradients(self.model, group, self.loss_fn, batch, counted, beside)

    # ------------------------------------------------------------------ in the backward pass

    def _at_once(self, operand: Tensor, squares: Tensor, sums: Sums) -> bool:
        # A view of a parameter (`weight.t()`) has nothing of FSDP2 behind it. Kept until the end of
        # the backward, such squares would add up to a whole model's.
        if id(operand._base) not in self._names:
            return False
        for name, back in squares_through(operand, squares, self.parameters, self._names):
            sums.add(name, back)
        return True

    def _squares(self, rule: Rule, grad: Tensor, names: Collection[str], into: Into) -> Squares:
        # Some rules read the weights, and are called before FSDP2's own hook.
        self._unsharded.gather({n for k in names for n in leaves(rule.operands[k], self._names)})
        # An error here would leave the other ranks waiting in their backward: it is told after it.
        if self._failure is None:
            try:
                return super()._squares(rule, grad, names, into)
            except Exception as reason:
                self._failure = reason
        return {name: torch.zeros_like(rule.operands[name]) for name in names}

    def _per_sample(
        self, rule: Rule, grad: Tensor, names: Collection[str]
    ) -> dict[str, Tensor | Carried]:
        self._unsharded.gather({n for k in names for n in leaves(rule.operands[k], self._names)})
        if self._failure is None:
            try:
                return super()._per_sample(rule, grad, names)
            except Exception as reason:
                self._failure = reason
        return {}

    def _pull_back(
        self,
        later: list[tuple[Tensor, Tensor]],
        pulled: list[tuple[Tensor, Tensor | Carried]],
        plan: Plan,
        n: int,
        sums: Sums,
    ) -> None:
        failure, self._failure = self._failure, None
        with ranks.fail_together():
            if failure is not None:
                raise failure
        for operand, squares in later:
            with self._present(leaves(operand, self._names)):
                for name, back in squares_through(operand, squares, self.parameters, self._names):
                    sums.add(name, back)
        for group in self._unsharded.by_module(plan.pulled_parameters):
            made = [(w, each) for w, each in pulled if set(leaves(w, self._names)) & set(group)]
            needed = {name for w, _ in made for name in leaves(w, self._names)}
            wanted = {name: self.parameters[name] for name in group}
            with self._present(needed):
                found = per_sample_through(made, wanted, self._names, n)
            for name in group:
                if name in found:
                    sums.add(name, found[name].square().sum(0))

    def _present(self, names: Collection[str]) -> AbstractContextManager[None]:
        return self._unsharded.present(names)


def _noted(inputs: object) -> list[tuple[int, dict[str, Any]]]:
    """For each tensor among a module's inputs, which object it is, and what was noted of it."""
    return [(id(tensor), notes(tensor)) for tensor in batches.tensors(inputs)]


def _as_before(inputs: Any, noted: list[tuple[int, dict[str, Any]]]) -> Any:
    """The inputs with their notes again, and one object again where they were one.

    Attention with three times the same input takes another way than with three equal ones.
    """
    first: dict[int, Tensor] = {}
    for (identity, known), tensor in zip(noted, batches.tensors(inputs), strict=True):
        kept = first.setdefault(identity, tensor)
        for name, value in known.items():
            setattr(kept, name, value)
    if len(first) == len(noted):
        return inputs
    order = iter(noted)
    return batches.map_tensors(inputs, lambda _: first[next(order)[0]])


def _worst_over_ranks(errors: probe.Errors) -> probe.Errors:
    everyone = ranks.gather(errors)
    return {
        name: (
            _largest([one[name][0] for one in everyone]),
            _largest([one[name][1] for one in everyone]),
            dtype,
        )
        for name, (_, _, dtype) in errors.items()
    }


def _largest(values: list[float]) -> float:
    """NaN if one of them is: no comparison sees it otherwise."""
    return max(values, key=lambda value: (value != value, value))
