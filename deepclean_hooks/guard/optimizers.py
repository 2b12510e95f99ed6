"""What the guard has to know of an optimizer: what it wraps, remembers, and couples."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Adagrad, Optimizer

# An optimizer is `Any` here: several (timm's Lookahead, schedule-free wrappers) are Optimizers in
# shape only.

_PER_TENSOR = "its step is scaled by a norm over the whole tensor, frozen entries included"
_MATRIX = "it mixes the rows and columns of a tensor, so a free entry's step depends on frozen ones"
COUPLES = {
    "Adafactor": "its second moment is factored over rows and columns",
    "AdafactorBigVision": "its second moment is factored over rows and columns",
    "CAME": "its second moment is factored over rows and columns",
    "Adahessian": "it averages curvature over the entries of a convolution kernel",
    "Adam_mini": "one second moment is shared by a block of entries",
    "AdamMini": "one second moment is shared by a block of entries",
    "StableAdamW": _PER_TENSOR,
    "Lamb": _PER_TENSOR,
    "LAMB": _PER_TENSOR,
    "FusedLAMB": _PER_TENSOR,
    "Lars": _PER_TENSOR,
    "LARS": _PER_TENSOR,
    "NovoGrad": _PER_TENSOR,
    "NvNovoGrad": _PER_TENSOR,
    "Mars": _PER_TENSOR,
    "AdamP": "it projects the step along the weights of each channel",
    "SGDP": "it projects the step along the weights of each channel",
    "Muon": _MATRIX,
    "AdaMuon": _MATRIX,
    "Kron": _MATRIX,
    "PSGD": _MATRIX,
    "Shampoo": _MATRIX,
    "DistributedShampoo": _MATRIX,
    "SOAP": _MATRIX,
    "GaLoreAdamW": _MATRIX,
    "GaLoreAdafactor": _MATRIX,
}

# Counters that some optimizers keep in the param group beside the state: schedule-free (k,
# weight_sum, lr_max), timm's Adan and LAMB (step), Lookahead (lookahead_step). Left at n with
# moments of 0 they skip the bias correction.
_COUNTERS = ("step", "k", "weight_sum", "lr_max", "lookahead_step")

# ScheduleFreeWrapper keeps its own z in the state of the inner optimizer during the inner step.
_SHARES_STATE = ("ScheduleFreeWrapper",)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's `AcceleratedOptimizer`, which itself writes nothing."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer


def require_readable(optimizers: Iterable[Any]) -> None:
    """Raises TypeError for what is no optimizer: without a `step` to follow, or without
    `param_groups`, which say what it steps."""
    for optimizer in map(unwrapped, optimizers):
        lacks = [name for name in ("step", "param_groups") if not hasattr(optimizer, name)]
        if lacks:
            raise TypeError(
                f"{type(optimizer).__name__} in optimizers= lacks {' and '.join(lacks)}, so what "
                "it steps is not known; give it param_groups, such as [{'params': list(...)}], and "
                "step(), or leave it out: frozen entries are then put back before every forward "
                "pass"
            )


def layers(optimizer: Any) -> list[Any]:
    """The optimizer, then those it steps (Lookahead, SAM, schedule-free wrappers hold some)."""
    stacked = [optimizer]
    for layer in stacked:  # grows as it is walked
        for value in vars(layer).values():
            if isinstance(value, Optimizer) and all(value is not known for known in stacked):
                stacked.append(value)
    return stacked


def stepping_around(optimizer: Any) -> Any:
    """The outermost optimizer whose `step` is calling this one's; itself where there is none.

    Read from the call stack: Lookahead does not call `Optimizer.__init__`, so torch's hooks miss it
    until its `zero_grad()` is called.
    """
    outer = optimizer
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        held = vars(caller).values() if hasattr(caller, "param_groups") else ()
        if any(value is outer for value in held):
            outer = caller
    return unwrapped(outer)


def shares_state(optimizer: Any) -> bool:
    """Whether the state of the optimizers inside may not be cleared while this one is stepping."""
    return type(optimizer).__name__ in _SHARES_STATE


def tensors_of(optimizer: Any) -> Iterator[Tensor]:
    """The tensors in the param groups as they are now: groups may be rebuilt at any time."""
    for group in optimizer.param_groups:
        yield from group["params"]


def forget(optimizer: Any, parameters: Container[int]) -> None:
    """Deletes what the optimizer remembers of the parameters (ids): moments, step counters."""
    if isinstance(optimizer, Adagrad):
        _restart_adagrad(optimizer, parameters)
        return
    state = getattr(optimizer, "state", {})  # one that remembers nothing may have none
    stepped = list(tensors_of(optimizer))
    # LBFGS keeps the history of all its parameters, ours among them, under the first one.
    one_history = "LBFGS" in type(optimizer).__name__
    if one_history or all(id(tensor) in parameters for tensor in stepped):
        state.clear()
    for tensor in stepped:
        if id(tensor) in parameters:
            state.pop(tensor, None)
    for group in optimizer.param_groups:
        if all(id(tensor) in parameters for tensor in group["params"]):
            for counter in set(_COUNTERS) & set(group):
                _restart(group, counter, getattr(optimizer, "defaults", {}))


def _restart_adagrad(optimizer: Adagrad, parameters: Container[int]) -> None:
    # Before torch 2.15 its state was made in the constructor only: without it, step() fails.
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            if id(tensor) in parameters and optimizer.state.get(tensor):
                optimizer.state[tensor]["step"].zero_()
                optimizer.state[tensor]["sum"].fill_(group["initial_accumulator_value"])


def _restart(group: dict[str, Any], counter: str, defaults: dict[str, Any]) -> None:
    if counter in defaults:
        group[counter] = defaults[counter]
    elif isinstance(group[counter], Tensor):
        group[counter].zero_()
    else:
        group[counter] = 0


def coupling(optimizer: Any) -> str | None:
    """Why a free entry's step depends on frozen entries under this optimizer; None: it does not."""
    if any(group.get("caution", False) for group in optimizer.param_groups):
        return "caution=True divides each step by the agreement averaged over the tensor"
    return COUPLES.get(type(optimizer).__name__)


def warn_if_coupled(optimizer: Any) -> None:
    """Warns that the free entries of a coupling optimizer do not train as they would alone."""
    why = coupling(optimizer)
    if why is not None:
        warnings.warn(
            f"{type(optimizer).__name__} couples entries: {why}. Frozen entries keep their bits, "
            "but the free ones do not train as they would alone; under Adam, AdamW or SGD they do",
            stacklevel=2,
        )


def unseen_writers(optimizer: Any) -> list[str]:
    """The methods that write parameters unseen by torch's step hooks."""
    methods = []
    if not getattr(optimizer.step, "hooked", False):
        methods.append("step")
    # Schedule-free: eval() and train() recompute the parameters from a hidden copy (frozen entries
    # moved 9e-4).
    if callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None)):
        methods += ["eval", "train"]
    return methods
