"""Faults at any tensor operation of a run, and what has to be as before once it was aborted.

For every adapter: `make` builds a fresh `Scene`, `aborted(make, at)` runs it into a fault at its
`at`-th operation and tells what is left behind. Forward and backward passes, optimizer steps, hooks
and the package's own work are operations alike.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from deepclean_hooks.guard import guard

Traces = dict[str, object]


class Fault(Exception):
    """What a test injected."""


@dataclass
class Scene:
    """A run to be aborted: `run()` trains `model`; `check` asserts what else must hold after."""

    model: nn.Module
    run: Callable[[], object]
    optimizers: list[Any] = field(default_factory=list)
    check: Callable[[], None] = lambda: None


Make = Callable[[], Scene]


class _AtOperation(TorchDispatchMode):
    """Raises at the `at`-th operation; counts them all."""

    def __init__(self, at: int | None, error: type[BaseException]) -> None:
        super().__init__()
        self.seen, self.at, self.error = 0, at, error

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.seen += 1
        if self.seen == self.at:
            raise self.error(f"injected at operation {self.at}, {func}")
        return func(*args, **(kwargs or {}))


def operations(make: Make) -> int:
    """How many operations a run takes without a fault."""
    scene = make()
    with _AtOperation(None, Fault) as mode:
        scene.run()
    return mode.seen


def points(make: Make, count: int, seed: int) -> list[int]:
    """Up to `count` of the operations at which a run can be aborted, by chance, in order."""
    total = operations(make)
    return sorted(random.Random(seed).sample(range(1, total + 1), min(count, total)))


def aborted(make: Make, at: int, error: type[BaseException] = Fault) -> list[str]:
    """What an abort at an operation left behind, by name; empty if all is as before.

    Asserts that the fault came out as it is, and the scene's own check.
    """
    scene = make()
    before = traces(scene.model, scene.optimizers)
    try:
        with _AtOperation(at, error):
            scene.run()
    except error as came_out:
        assert f"injected at operation {at}," in str(came_out)  # noqa: PT017  # any error type
    else:
        raise AssertionError(f"operation {at} was aborted, and nothing was raised")
    scene.check()
    return differences(before, traces(scene.model, scene.optimizers))


def differences(before: Traces, after: Traces) -> list[str]:
    """The names under which two collections of traces differ."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def traces(model: nn.Module, optimizers: list[Any] | None = None) -> Traces:
    """Everything that a run may leave behind on a model, on optimizers and in the process."""
    collected: Traces = {}
    for name, module in model.named_modules():
        collected[f"module {name}: mode"] = module.training
        collected[f"module {name}: attributes"] = sorted(vars(module))
        collected[f"module {name}: class"] = type(module)
        for kind, hooks in vars(module).items():
            if kind.endswith("_hooks"):
                collected[f"module {name}: {kind}"] = list(hooks)
    for name, parameter in model.named_parameters():
        collected[f"parameter {name}: requires_grad"] = parameter.requires_grad
        collected[f"parameter {name}: object"] = id(parameter)
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            collected[f"parameter {name}: {kind}"] = list(getattr(parameter, kind) or ())
        collected[f"parameter {name}: attributes"] = sorted(vars(parameter))
    for i, optimizer in enumerate(optimizers or ()):
        collected[f"optimizer {i}: attributes"] = sorted(vars(optimizer))
        collected[f"optimizer {i}: class"] = type(optimizer)
    return {**collected, **dict(_of_the_process()), **dict(_random())}


def _random() -> Iterator[tuple[str, object]]:
    yield "random: torch", torch.get_rng_state().tolist()
    yield "random: numpy", str(np.random.get_state())
    yield "random: python", random.getstate()


def _of_the_process() -> Iterator[tuple[str, object]]:
    for registry in (torch_module, torch_optimizer):
        for name, value in vars(registry).items():
            if name.startswith("_global_") and isinstance(value, dict):
                yield f"global: {name}", list(value)
    yield "global: guarded parameters", sorted(guard._guarded)
    yield "global: gradients", torch.is_grad_enabled()
    yield "global: inference", torch.is_inference_mode_enabled()
    yield "global: autocast", torch.is_autocast_enabled("cpu")
    yield "global: anomaly", torch.is_anomaly_enabled()
    yield "global: dtype", torch.get_default_dtype()
    yield "global: threads", torch.get_num_threads()
    yield "global: deterministic", torch.are_deterministic_algorithms_enabled()
    yield "global: precision", torch.get_float32_matmul_precision()
    yield "global: tf32 matmul", torch.backends.cuda.matmul.allow_tf32
    yield "global: tf32 cudnn", torch.backends.cudnn.allow_tf32
    yield "global: cudnn", (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    yield "global: function modes", len(_get_current_function_mode_stack())
    yield "global: dispatch modes", len(_get_current_dispatch_mode_stack())
    yield "global: warnings", [str(entry) for entry in warnings.filters]
