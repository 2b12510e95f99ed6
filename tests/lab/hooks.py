"""The hooks that hold a place: on a model, and for all optimizers in torch's global registries."""

from __future__ import annotations

from torch import nn
from torch.optim import optimizer


def hooks_of_torch() -> tuple[list[int], list[int]]:
    """Those that run before and after every optimizer's step."""
    registries = "_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"
    before, after = (list(getattr(optimizer, registry)) for registry in registries)
    return before, after


def hooks_on(model: nn.Module) -> list[list[int]]:
    """Those of its modules and of its parameters, in their order."""
    of_modules = [
        (m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks)
        for m in model.modules()
    ]
    of_parameters = [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()]
    return [list(hooks or ()) for group in (*of_modules, *of_parameters) for hooks in group]
