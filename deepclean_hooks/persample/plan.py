"""Which way each parameter's gradient is squared: at once, pulled back per sample first, or one
sample at a time.

fast: the only way from the parameter p to the operands w' is a selection of entries (identity,
view, permute, chunk), each entry selected at most once: then sum g_w'^2 goes back through the
selection as it is. pulled: weight standardisation, parametrisations, bias tables, tied weights,
repeated modules: the per-sample gradient of w' goes back through w' = f(p), is summed over the
uses, THEN squared. loop: no rule, or the self-check failed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepclean_hooks.persample.forwards import Meetings, Use
from deepclean_hooks.persample.rules.broadcast import Carrying

Operand = tuple[int, str]
"""(index of the use, name of the operand)."""

Met = tuple[str, str, tuple[str, ...]]
"""(Name of the rule, name of the operand, the parameters that it is made of)."""

Present = Callable[[Collection[str]], AbstractContextManager[None]]


@dataclass
class Plan:
    """How one form of batch is served; parameters in neither `served_by` nor `loop` do not reach
    the loss.

    `checked`: what the one-sample loop has confirmed, in whatever batch. `unverified`: parameters
    whose gradient was 0 in all samples seen so far. `largest`: the largest sum of the self-check.
    `owned`: whether samples have to be told apart in each backward. `coarse`: whether the model
    computes in less than its parameters' precision.
    """

    seen: Meetings
    fast: set[Operand] = field(default_factory=set)
    pulled: set[Operand] = field(default_factory=set)
    sources: dict[Operand, list[str]] = field(default_factory=dict)
    places: dict[int, tuple[str, int]] = field(default_factory=dict)
    rules: dict[int, str] = field(default_factory=dict)
    checked: set[Met] = field(default_factory=set)
    served_by: dict[str, list[str]] = field(default_factory=dict)
    pulled_parameters: set[str] = field(default_factory=set)
    loop: dict[str, str] = field(default_factory=dict)
    unverified: set[str] = field(default_factory=set)
    largest: float = 0.0
    bytes_per_sample: int = 0
    owned: bool = False
    coarse: bool = False

    def operands_of(self, names: Collection[str]) -> list[Operand]:
        """The operands made of these parameters."""
        return [key for key, sources in self.sources.items() if set(sources) & set(names)]

    def met(self, names: Collection[str]) -> set[Met]:
        """In which way these parameters, alone or with others of them, meet the data."""
        return {
            (self.rules[use], operand, tuple(self.sources[use, operand]))
            for use, operand in self.fast | self.pulled
            if set(self.sources[use, operand]) <= set(names)
        }

    def split(self) -> bool:
        """Whether a parameter is used more than once, each time other entries of it."""
        used = [name for key in self.fast for name in self.sources[key]]
        return len(used) > len(set(used))

    def parameters_of(self, use: int) -> set[str]:
        """The parameters that the operands of a use are made of."""
        return {n for (index, _), names in self.sources.items() if index == use for n in names}

    def demote(self, reasons: Mapping[str, str]) -> None:
        """Sends parameters to the one-sample loop, with the reason for each.

        Operands they share with others are pulled from now on, so that the others keep their part.
        """
        self.loop.update(reasons)
        self.unverified -= set(reasons)
        self.pulled_parameters -= set(reasons)
        for operand, names in self.sources.items():
            if set(names) <= set(self.loop):
                self.fast.discard(operand)
                self.pulled.discard(operand)
            elif set(names) & set(self.loop):
                self.fast.discard(operand)
                self.pulled.add(operand)


def leaves(tensor: Tensor, names: Mapping[int, str]) -> list[str]:
    """The parameters (by `names`, id -> name) in the graph behind a tensor, in order of name."""
    if id(tensor) in names:
        return [names[id(tensor)]]
    found: set[str] = set()
    seen: set[object] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names:
            found.add(names[id(leaf)])
        waiting.extend(parent for parent, _ in node.next_functions)
    return sorted(found)


def classify(
    seen: Meetings,
    uses: Sequence[Use],
    refused: Iterable[tuple[list[Tensor], str]],
    loss: Tensor,
    parameters: Mapping[str, Tensor],
    present: Present = lambda names: nullcontext(),
) -> Plan:
    """The plan for the uses that a served forward pass has just made; `loss` is what that pass
    ended in. `present(names)`: inside it the values of these parameters can be read."""
    names = {id(p): name for name, p in parameters.items()}
    plan = Plan(seen, places={use.index: use.place for use in uses})
    plan.rules = {use.index: type(use.rule).__name__ for use in uses}
    operands = {
        (use.index, name): (operand, use.rule)
        for use in uses
        for name, operand in use.rule.operands.items()
    }
    plan.sources = {key: leaves(w, names) for key, (w, _) in operands.items()}
    for key, (_, rule) in operands.items():
        for name in plan.sources[key]:
            plan.served_by.setdefault(name, []).append(type(rule).__name__)
    slow = _pulled_parameters(operands, plan.sources, parameters, present)
    for key, sources in plan.sources.items():
        if sources:
            (plan.pulled if set(sources) & slow else plan.fast).add(key)
    plan.pulled_parameters = slow
    plan.bytes_per_sample = (
        sum(_bytes(operand) for key, (operand, _) in operands.items() if key in plan.pulled)
        + sum(_bytes(parameters[name]) for name in slow)
        + sum({id(rule): rule.bytes_per_sample() for _, rule in operands.values()}.values())
    )
    reasons: dict[str, str] = {}
    for tensors, reason in refused:
        for tensor in tensors:
            reasons.update(dict.fromkeys(leaves(tensor, names), reason))
    for name in leaves(loss, names):
        reasons[name] = "it reaches the loss through an operation that was not intercepted"
    plan.demote(reasons)
    return plan


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pulled_parameters(
    operands: Mapping[Operand, tuple[Tensor, object]],
    sources: Mapping[Operand, list[str]],
    parameters: Mapping[str, Tensor],
    present: Present,
) -> set[str]:
    slow: set[str] = set()
    alone: dict[str, list[Tensor]] = {}  # the operands made of this parameter and no other
    for key, (operand, rule) in operands.items():
        names = sources[key]
        if len(names) != 1 or isinstance(rule, Carrying):
            slow.update(names)
        else:
            alone.setdefault(names[0], []).append(operand)
    for name, made in alone.items():
        # A parameter that is itself the one operand is no question, and the most frequent case.
        if len(made) > 1 or made[0] is not parameters[name]:
            with present([name]):
                if not _each_entry_once(made, parameters[name]):
                    slow.add(name)
    grown = True
    while grown:  # an operand pulled for one of its parameters is pulled for all of them
        more = {n for s in sources.values() if slow & set(s) for n in s} - slow
        slow |= more
        grown = bool(more)
    return slow


def _each_entry_once(operands: Iterable[Tensor], parameter: Tensor) -> bool:
    """Whether the operands are selections of the parameter's entries, and none is selected
    twice."""
    used = torch.zeros_like(parameter, requires_grad=False)
    for operand in operands:
        selected = _selection(operand, parameter)
        if selected is None:
            return False
        used += selected
    return not bool((used > 1.5).any())


def _selection(operand: Tensor, parameter: Tensor) -> Tensor | None:
    """How often each entry of the parameter is selected by w' = f(p), or None if f is no selection
    of entries.

    A random test: J^T v squared equals J^T (v squared) for a selection, and for nothing else but by
    chance.
    """
    if operand is parameter:
        return torch.ones_like(parameter, requires_grad=False)
    noise = torch.randn_like(operand)

    def back(v: Tensor) -> Tensor:
        return torch.autograd.grad(operand, parameter, v, retain_graph=True)[0]

    if not torch.allclose(back(noise).square(), back(noise.square()), atol=1e-6, rtol=1e-5):
        return None
    return back(torch.ones_like(operand))
