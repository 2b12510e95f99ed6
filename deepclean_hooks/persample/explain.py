"""Which rule serves each parameter of a model, and what that costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.wrappers import require_trainable, unwrap
from deepclean_hooks.persample.engine import SquaredGradients
from deepclean_hooks.persample.plan import Plan
from deepclean_hooks.ranks import fsdp


@dataclass(frozen=True)
class Served:
    """One parameter: `way` is fast, pulled, loop or unused; `why` says why it needs the loop.

    `rules` names the rule of each operation in which it meets the data. `bytes_per_sample` is what
    its per-sample gradient takes while a batch is measured: 0 on the fast way, whose squares are
    summed at once.
    """

    name: str
    shape: tuple[int, ...]
    way: str
    rules: tuple[str, ...]
    bytes_per_sample: int
    why: str = ""


@dataclass(frozen=True)
class Explanation:
    """How the exact Fisher diagonal of a model is computed, parameter by parameter."""

    parameters: tuple[Served, ...]

    def looped(self) -> dict[str, str]:
        """The parameters that need the one-sample loop, with the reason for each."""
        return {p.name: p.why for p in self.parameters if p.way == "loop"}

    def __str__(self) -> str:
        """A line for each parameter, after a line that counts the ways."""
        ways = Counter(p.way for p in self.parameters)
        lines = [", ".join(f"{count} {way}" for way, count in sorted(ways.items()))]
        width = max(len(p.name) for p in self.parameters)
        for p in self.parameters:
            counted = Counter(p.rules)
            rules = ", ".join(f"{r} x{k}" if k > 1 else r for r, k in counted.items())
            cost = f"  {p.bytes_per_sample} bytes a sample" if p.bytes_per_sample else ""
            why = f"  ({p.why})" if p.why else ""
            lines.append(f"{p.name:{width}}  {p.way:6}  {rules or '-'}{cost}{why}")
        return "\n".join(lines)


def explain(model: nn.Module, batch: Batch, *, loss_fn: LossFn | None = None) -> Explanation:
    """Which rule serves each trainable parameter for batches of this form; the model is unchanged.

    Runs the probes and the self-check on three samples of the batch. Raises as `fisher_diagonal`
    does for a bad batch, loss or model.
    """
    inner = unwrap(model)
    fsdp.refuse_sharded(inner, "explain")
    parameters = require_trainable(inner)
    with no_trace.no_trace(inner), no_trace.float32_weights(inner) as dtype:
        engine = SquaredGradients(inner, parameters, loss_fn=loss_fn or losses.cross_entropy)
        plan = engine.plan_for(batches.to(batch, no_trace.device_of(inner), dtype))
        return Explanation(tuple(_served(name, p, plan) for name, p in parameters.items()))


def _served(name: str, parameter: nn.Parameter, plan: Plan) -> Served:
    rules = tuple(plan.served_by.get(name, ()))
    size = parameter.numel() * parameter.element_size()
    if name in plan.loop:
        way = "loop"
    elif name in plan.pulled_parameters:
        way = "pulled"
    else:
        way, size = ("fast" if rules else "unused"), 0
    return Served(name, tuple(parameter.shape), way, rules, size, plan.loop.get(name, ""))
