"""Models under FSDP2 (`fully_shard`): gathered, put back, and refused where nothing is exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks.ranks.shards import is_shard, loaded


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (or tensor parallelism) has spread a parameter of the model over the ranks."""
    if loaded("torch.distributed.tensor", "DTensor") is None:
        return False
    return any(map(is_shard, model.parameters())) or any(fully_sharded(model))


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by name: under FSDP2 the sharded ones, whatever ran last."""
    reshard(model)
    return dict(model.named_parameters())


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters back in their places under FSDP2; changes no other model.

    FSDP2 leaves its root unsharded after a forward pass, under parameters that are other objects.
    """
    for module in fully_sharded(model):
        module.reshard()


def settle(model: nn.Module) -> None:
    """Lets FSDP2 forget a pass that broke off or had no backward, and reshards; changes no other
    model.

    An exception in a forward pass leaves it in the middle of one, which the next call would join.
    """
    for module in fully_sharded(model):
        state = module._get_fsdp_state()
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
        getattr(state._comm_ctx, "post_forward_order", []).clear()  # absent before the first pass
        state._training_state = _idle(state._training_state)
        for group in _groups(state):
            group._training_state = _idle(group._training_state)
            group._post_forward_indices.clear()
    reshard(model)


def _idle(state: Any) -> Any:
    return type(state).IDLE


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.10 and later
    if several is not None:
        return list(several)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def fully_sharded(model: nn.Module) -> Iterator[Any]:
    """The modules that `fully_shard` was called on."""
    sharded = loaded("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules() if sharded is not None else ():
        if isinstance(module, sharded):
            yield module


class Unsharded:
    """The parameters as the modules of a model under FSDP2 see them in a forward pass: whole, but
    their memory is there only while FSDP2 or `present` holds it.

    Raises ValueError, on all ranks, for a precision in which nothing is exact.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        settle(model)
        self.sharded = dict(model.named_parameters())
        self.parameters: dict[str, nn.Parameter] = dict(self.sharded)
        self._owner: dict[str, Any] = {}
        for module in fully_sharded(model):
            module.unshard()
            now = dict(model.named_parameters())
            for name, sharded in self.sharded.items():
                if now.get(name) is not sharded and name not in self._owner:
                    self.parameters[name], self._owner[name] = now[name], module
            module.reshard()
        _refuse_precision(model, self.sharded, self.parameters)

    @contextlib.contextmanager
    def present(self, names: Iterable[str]) -> Iterator[None]:
        """Their memory holds the weights inside the block; all ranks enter it with the same
        names."""
        owners = list(dict.fromkeys(self._owner[n] for n in sorted(names) if n in self._owner))
        for owner in owners:
            owner.unshard()
        try:
            yield
        finally:
            for owner in owners:
                owner.reshard()

    def gather(self, names: Iterable[str]) -> None:
        """Fetches their memory before FSDP2 does, in the backward pass at whose end it lets go."""
        for owner in dict.fromkeys(self._owner[n] for n in sorted(names) if n in self._owner):
            owner.unshard()

    def one_of_each(self, names: Iterable[str]) -> list[Tensor]:
        """The smallest of these parameters of each module that FSDP2 gathers by itself.

        A backward that reaches them passes every module on every rank, whatever else it is for:
        where only one rank's goes through a module, that rank waits for the others' part of it.
        """
        smallest: dict[int, nn.Parameter] = {}
        for name in names:
            owner, parameter = id(self._owner.get(name)), self.parameters[name]
            if owner not in smallest or parameter.numel() < smallest[owner].numel():
                smallest[owner] = parameter
        return list(smallest.values())

    def by_module(self, names: Iterable[str]) -> list[list[str]]:
        """The names in groups that FSDP2 gathers together; the others, which are never sharded, in
        one more."""
        groups: dict[int, list[str]] = {}
        for name in sorted(names):
            groups.setdefault(id(self._owner.get(name)), []).append(name)
        return sorted(groups.values())

    @contextlib.contextmanager
    def around_forward(
        self, before: Callable[[object], Any], after: Callable[[Any, Any], Any]
    ) -> Iterator[None]:
        """Makes `after(inputs, before(inputs))` the inputs of each module under FSDP2, whose hooks
        in between put other tensors in their place."""
        noted: list[Any] = []
        with contextlib.ExitStack() as stack:
            for module in fully_sharded(self.model):
                first = module.register_forward_pre_hook(
                    lambda _, args, kwargs: noted.append(before((args, kwargs))),
                    prepend=True,
                    with_kwargs=True,
                )
                last = module.register_forward_pre_hook(
                    lambda _, args, kwargs: after((args, kwargs), noted.pop()), with_kwargs=True
                )
                stack.callback(first.remove)
                stack.callback(last.remove)
            yield


def require_measurable(model: nn.Module, ranks: int) -> None:
    """Raises ValueError for a sharded model that cannot be measured exactly, with the way out."""
    if not is_sharded(model):
        return
    settle(model)
    problems: dict[str, str] = {}  # kind -> the first of its kind
    if not any(fully_sharded(model)):
        problems["tensor parallel"] = (
            "its parameters are DTensors of tensor parallelism; use fully_shard()"
        )
    for name, p in model.named_parameters():
        if not is_shard(p):
            continue
        where: Any = p
        if p.dtype in (torch.float16, torch.bfloat16):
            problems.setdefault(
                "half", f"{name} is {p.dtype}, in which no gradient is exact; shard float32 weights"
            )
        if where.device_mesh.size() != ranks:
            problems.setdefault(
                "mesh",
                f"{name} lies on {where.device_mesh.size()} of the {ranks} ranks, which share the "
                "samples; shard over all of them",
            )
        if p.device.type != where.device_mesh.device_type:
            problems.setdefault(
                "offload", f"{name} is kept on the CPU (CPUOffloadPolicy); keep it on the GPU"
            )
    for module in fully_sharded(model):
        policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
        if getattr(policy, "output_dtype", None) is not None:
            problems["outputs"] = (
                "MixedPrecisionPolicy(output_dtype=...) rounds outputs; leave it out"
            )
    _raise(model, problems)


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raises ValueError for a sharded model; `what` is that which needs whole weights."""
    if is_sharded(model):
        raise ValueError(
            f"the parameters of {type(model).__name__} are sharded (fully_shard, FSDP2), and "
            f"{what} needs them whole; call it before fully_shard() or Accelerator.prepare(): "
            "measure(), select() and reset() before, guard() after"
        )


def _refuse_precision(
    model: nn.Module, sharded: dict[str, nn.Parameter], unsharded: dict[str, nn.Parameter]
) -> None:
    problems: dict[str, str] = {}
    for name, p in sharded.items():
        if is_shard(unsharded[name]) and is_shard(p):
            problems["tensor parallel"] = (
                f"{name} is still a DTensor when FSDP2 has gathered it (tensor parallelism); use "
                "fully_shard() alone"
            )
        elif unsharded[name].dtype != p.dtype:
            problems.setdefault(
                "mixed",
                f"{name} is computed with in {unsharded[name].dtype} "
                "(MixedPrecisionPolicy(param_dtype=...)), in which the Fisher diagonal is off by "
                "percents; leave the policy out",
            )
    _raise(model, problems)


def _raise(model: nn.Module, problems: dict[str, str]) -> None:
    if problems:
        raise ValueError(
            f"{type(model).__name__} is sharded in a way that cannot be measured exactly: "
            f"{'; '.join(problems.values())}; or call measure(), select() and reset() before "
            "sharding, and guard() after"
        )
