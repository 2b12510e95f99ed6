"""Whether a model in eval mode is a function of its input and nothing else, tried on a few samples
before anything is measured."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.persample.forwards import writes_in_place

REPEATS = 16  # of a forward pass that draws random numbers: a rare drop must show
SAME_LOSS = {torch.float64: 1e-5, torch.float32: 1e-3}  # of 1 + the loss: a model may compute in
# less than its parameters' precision, and kernels depend on the batch size


class Unmeasurable(ValueError):
    """The model has no per-sample gradient that could be measured."""


class NotRepeatable(Unmeasurable):
    """The same batch gives another loss in each forward pass."""


class WritesWeights(Unmeasurable):
    """The forward pass changes the model's parameters."""


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two losses are the same but for rounding."""
    tolerance = SAME_LOSS.get(one.dtype, 1e-2)
    near = (one.detach() - other.detach()).abs() <= tolerance * (1 + other.detach().abs())
    return bool(near.all())


def first_loss(model: nn.Module, loss_fn: LossFn, few: Batch) -> tuple[Tensor, bool]:
    """The loss of each sample from a plain forward pass, and whether the pass drew random numbers.

    Raises WritesWeights, with the weights as they were, for a model that changes them.
    """
    before = _random_state()
    with _Writes(model):
        loss = losses.per_sample(loss_fn(model, few), batches.size(few))
    return loss, _random_state() != before


def require_repeatable(
    model: nn.Module,
    loss_fn: LossFn,
    few: Batch,
    first: Tensor,
    again: Tensor,
    repeats: int,
    agreed: Callable[[bool], bool],
) -> None:
    """Raises NotRepeatable if `again`, or one of `repeats` more forward passes, is not the first
    loss."""
    first, again = first.detach(), again.detach()
    differs = agreed(not same(first, again))
    for _ in range(repeats):
        if not differs:
            with torch.no_grad():
                again = losses.per_sample(loss_fn(model, few), len(first))
            differs = agreed(not same(first, again))
    if not differs:
        return
    sample = int((first - again).abs().argmax())
    drawing = _Draws(model)
    with drawing, torch.no_grad():
        loss_fn(model, few)
    why = (
        f"{', '.join(drawing.names[:5])} draw random numbers in eval mode; pass "
        "training=self.training to F.dropout (True is its default), and switch the like off in "
        "eval mode"
        if drawing.names
        else "its forward pass depends on something else than its input: a count of its calls, or "
        "random numbers of Python's or NumPy's; make it a function of its input in eval mode"
    )
    raise NotRepeatable(
        f"the same batch twice gives two losses ({float(first[sample]):.6g}, then "
        f"{float(again[sample]):.6g} for one sample), so no measurement could be repeated: {why}"
    )


def _random_state() -> tuple[object, ...]:
    states: list[object] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state().numpy().tobytes())
    if "numpy" in sys.modules:
        kept = sys.modules["numpy"].random.get_state()
        states += [kept[1].tobytes(), *kept[2:]]
    return tuple(states)


class _Writes(TorchFunctionMode):
    """Refuses writes into the model's parameters that change them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {
            p.untyped_storage().data_ptr(): name
            for name, p in model.named_parameters()
            if type(p) is nn.Parameter and p.numel()
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one torch function, and takes it back if it changed a parameter."""
        kwargs = kwargs or {}
        if func in (F.embedding, F.embedding_bag):
            self._require_small_rows(*args, **kwargs)
        name = getattr(func, "__name__", "")
        written = args[0] if args and (writes_in_place(name) or name == "__set__") else None
        if not isinstance(written, Tensor) or self._name(written) is None:
            return func(*args, **kwargs)
        before, where = written.detach().clone(), self._name(written)
        out = func(*args, **kwargs)
        if not torch.equal(before, written.detach()):
            with torch.no_grad():
                written.detach().copy_(before)
            raise WritesWeights(
                f"the forward pass writes to {where} ({name}), so measuring and scoring would "
                "change the model; make it use changed values without storing them in the "
                "parameter"
            )
        return out

    def _name(self, tensor: Tensor) -> str | None:
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
            return None
        return self._names.get(tensor.untyped_storage().data_ptr())

    def _require_small_rows(
        self,
        input: Tensor,
        weight: Tensor,
        third: Any = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        **others: Any,
    ) -> None:
        name = self._name(weight)
        if max_norm is None or name is None:
            return
        over = int((weight.detach().norm(norm_type, 1) > max_norm).sum())
        if over:
            raise WritesWeights(
                f"reading {name} changes it: {over} of its {len(weight)} rows are longer than "
                f"max_norm={max_norm}, and F.embedding scales them down where they are read, so "
                "measuring, scoring and training would all write to it; scale the rows once, "
                f"torch.no_grad(): weight.renorm_({norm_type:g}, 0, {max_norm}), and set the "
                "module's max_norm to None"
            )


class _Draws(TorchFunctionMode):
    """Notes which torch functions draw random numbers, and in which module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: list[str] = []
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._inside: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Any:
        self._hooks = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._inside.append(self._modules.get(id(module)) or type(module).__name__)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one torch function."""
        before = _random_state()
        out = func(*args, **(kwargs or {}))
        if _random_state() != before:
            where = f" in {self._inside[-1]}" if self._inside else ""
            name = f"{getattr(func, '__name__', func)}{where}"
            if name not in self.names:
                self.names.append(name)
        return out
