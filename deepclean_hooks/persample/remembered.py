"""What was found out about a model, kept for its next measurement and dropped with the model."""

from __future__ import annotations

from weakref import ReferenceType, WeakKeyDictionary

from torch import nn

from deepclean_hooks.persample.engine import Plans

_Structure = tuple[object, ...]

_PLANS: WeakKeyDictionary[nn.Module, tuple[_Structure, Plans]] = WeakKeyDictionary()


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
