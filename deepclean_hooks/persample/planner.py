"""How a batch of one form is measured: found out on three samples, checked against the one-sample
loop, and remembered as long as the model lives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from weakref import ReferenceType, WeakKeyDictionary, WeakMethod, ref

import torch
from torch import Tensor, nn

from deepclean_hooks.data import batches
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.persample import loop, probe, repeatable
from deepclean_hooks.persample.accumulate import Sums
from deepclean_hooks.persample.forwards import Meetings, ServedPass, SharedRows
from deepclean_hooks.persample.plan import Plan, classify

Plans = dict[object, Plan]
"""(Form of a batch, names of the parameters, weak reference to the loss) -> plan; all of one
model."""

DEFAULT_MEMORY_BUDGET = 2**28  # bytes of per-sample gradients held at once

_Structure = tuple[object, ...]

_PLANS: WeakKeyDictionary[nn.Module, tuple[_Structure, Plans]] = WeakKeyDictionary()


class Planner(ABC):
    """Plans for the batches of one model; the passes themselves are its subclass's."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        loss_fn: LossFn,
        memory_budget: int,
        plans: Plans | None,
    ) -> None:
        self.model, self.parameters, self.loss_fn = model, dict(parameters), loss_fn
        self.memory_budget = memory_budget
        self.notes: dict[str, str] = {}  # parameter -> why it needs the one-sample loop
        self._plans: Plans = {} if plans is None else plans

    @abstractmethod
    def _forward(self, batch: Batch, plan: Plan) -> tuple[ServedPass, Tensor]:
        """A served forward pass of the batch: the pass with its uses, and the loss of each
        sample."""

    @abstractmethod
    def _add(self, batch: Batch, counted: int, plan: Plan, sums: Sums, loops: bool = True) -> None:
        """Adds the squares of the first `counted` samples by the plan; without the loop, and
        without checking what is unverified, if `loops` is False."""

    @abstractmethod
    def _new_sums(self, dtype: torch.dtype) -> Sums:
        """Empty sums of all parameters."""

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

    def _first_loss(self, few: Batch) -> tuple[Tensor, bool]:
        return repeatable.first_loss(self.model, self.loss_fn, few)

    def _agreed(self, condition: bool) -> bool:
        """Whether a condition holds on one of the ranks that run the same passes."""
        return condition

    def _make_plan(self, batch: Batch) -> Plan:
        few = probe.samples(batch, probe.PROBE_SAMPLES)
        # Without interception first: what is wrong with the user's data or model comes as it is.
        first = self._first_loss(few)
        try:
            seen = probe.meetings(self.model, self.loss_fn, batch, first, self._agreed)
            plan = self._classified(few, seen)
        except repeatable.Unmeasurable:
            raise
        except Exception as reason:  # whatever it is, the one-sample loop needs no interception
            if probe.of_the_machine(reason):
                raise
            plan = Plan(Meetings())
            why = f"it could not be probed: {type(reason).__name__}: {reason}"
            plan.demote(dict.fromkeys(self.parameters, why))
            return plan
        wrong = self._self_check(few, plan)
        doubted = {plan.places[index] for index, name in plan.operands_of(wrong)}
        if not doubted - seen.doubted:
            return plan
        # A sample's NaN may stay in it and yet mark another's rows: they show in the backward.
        seen.doubted |= doubted
        second = self._classified(few, seen)
        self._self_check(few, second)
        return second

    def _classified(self, few: Batch, seen: Meetings) -> Plan:
        served, loss = self._forward(few, Plan(seen))
        plan = classify(seen, served.uses, served.refused, loss, self.parameters, self._present)
        exact = max(p.dtype.itemsize for p in self.parameters.values())
        plan.coarse = any(dtype.itemsize < exact for dtype in served.dtypes)
        return plan

    def _self_check(self, few: Batch, plan: Plan) -> set[str]:
        """Compares with the one-sample loop on a few samples; what differs goes to the loop, and
        is returned.

        A parameter whose gradient is all zero there was not checked: `plan.unverified`.
        """
        trial = self._new_sums(next(iter(self.parameters.values())).dtype)
        while len(plan.loop) < len(self.parameters):
            try:
                self._add(few, probe.PROBE_SAMPLES, plan, trial, loops=False)
                break
            except SharedRows as reason:
                shared = [
                    n
                    for (use, _), names in plan.sources.items()
                    if use == reason.use
                    for n in names
                ]
                plan.demote(dict.fromkeys(shared, f"self-check: {reason}"))
                trial = self._new_sums(next(iter(self.parameters.values())).dtype)
            except Exception as reason:
                if probe.of_the_machine(reason):
                    raise
                plan.demote(dict.fromkeys(self.parameters, f"self-check: {reason}"))
        checked = {n: p for n, p in self.parameters.items() if n not in plan.loop}
        truth = (
            self._one_by_one(group, few) for group in probe.groups(checked, self._group_bytes())
        )
        errors = self._compared(trial.take, truth)
        plan.largest = probe.largest(errors)
        wrong = probe.disagreements(errors, plan.largest, plan.coarse)
        plan.demote(wrong)
        zero = {name for name, (_, size, _) in errors.items() if size == 0}
        plan.checked |= plan.met(errors.keys() - wrong.keys() - zero)
        plan.unverified = zero & set(plan.served_by) - set(plan.loop)
        return set(wrong)

    def _verify(self, batch: Batch, counted: int, plan: Plan, sums: Sums) -> None:
        """Checks parameters that were all zero so far and are not after this batch, whose squares
        were just added."""
        awake = self._awake(plan.unverified, sums)
        for group in probe.groups({n: self.parameters[n] for n in awake}, self._group_bytes()):
            truth = self._one_by_one(group, batch, counted)
            errors = self._compared(sums.take, iter([truth]))
            plan.demote(probe.disagreements(errors, plan.largest, plan.coarse))
            for name, squares in truth.items():
                sums.add(name, squares)
        plan.checked |= plan.met(set(awake) - set(plan.loop))
        plan.unverified.difference_update(awake)
        self.notes.update(plan.loop)

    def _awake(self, names: Collection[str], sums: Sums) -> list[str]:
        return [name for name in sorted(names) if sums.any(name)]

    def _one_by_one(
        self, group: Mapping[str, Tensor], batch: Batch, counted: int | None = None
    ) -> dict[str, Tensor]:
        return loop.squared_gradients(self.model, group, self.loss_fn, batch, counted)

    def _group_bytes(self) -> int:
        """Of parameters whose whole gradients are held at a time."""
        return self.memory_budget

    def _compared(
        self, take: Callable[[str], Tensor], truth: Iterator[dict[str, Tensor]]
    ) -> probe.Errors:
        return probe.compared(take, truth)

    def _present(self, names: Collection[str]) -> AbstractContextManager[None]:
        """Inside, the values of these parameters can be read; always, unless they are sharded."""
        return nullcontext()


def plans_of(model: nn.Module) -> Plans:
    """The plans of earlier measurements of this very model, to be used and added to.

    None are left of a model whose modules, settings or parameter shapes are others than then: a
    flag may change where the samples lie, which no operation shows.
    """
    structure = _structure(model)
    known, plans = _PLANS.get(model, (structure, {}))
    if known != structure:
        plans = {}
    for form in [form for form in plans if _of_dropped_loss(form)]:
        del plans[form]
    _PLANS[model] = structure, plans
    return plans


def _structure(model: nn.Module) -> _Structure:
    modules = tuple(
        (name, type(module).__qualname__, id(module), _settings(module))
        for name, module in model.named_modules()
    )
    parameters = tuple(
        (name, tuple(p.shape), p.stride(), str(p.dtype), str(p.device))
        for name, p in model.named_parameters(remove_duplicate=False)
    )
    return modules, parameters


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """A module's own numbers, flags and words; not its mode, which measuring sets."""
    plain = (bool, int, float, str, tuple, type(None))
    return tuple(
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, plain) and name != "training"
    )


def _of_dropped_loss(form: object) -> bool:
    loss = form[-1] if isinstance(form, tuple) else None
    return isinstance(loss, ReferenceType) and loss() is None


def _reference(loss_fn: LossFn) -> object:
    """What tells a loss from others without keeping it: it may hold the model that plans are of."""
    try:
        reference = WeakMethod(loss_fn) if isinstance(loss_fn, MethodType) else ref(loss_fn)
        hash(reference)
        return reference
    except TypeError:  # a dataclass, or a class with __slots__ without room for weak references
        return _Itself(loss_fn)


class _Itself:
    """Equal to that of the same object only, whatever that object says of itself; keeps it."""

    def __init__(self, kept: object) -> None:
        self.kept = kept

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.kept is self.kept

    def __hash__(self) -> int:
        return id(self.kept)
