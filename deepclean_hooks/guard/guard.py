"""No entry moves but the free ones, bit for bit, whatever optimizer steps the model.

Two halves, each needed: gradients of frozen entries are set to 0 during the backward pass, so that
clipping and closures see only what may train; and frozen bits are put back after every step,
because weight decay, momentum from before, Muon, AdamP, SGDP, MADGRAD, Kron and ASGD move entries
whose gradient is 0.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from deepclean_hooks import ranks
from deepclean_hooks.guard import norm_statistics as statistics
from deepclean_hooks.guard import optimizers as known
from deepclean_hooks.guard.added import Added, BeforeStep, Call
from deepclean_hooks.guard.compact import Compact
from deepclean_hooks.guard.follow import follow, weakly
from deepclean_hooks.guard.held import GuardError, Held, restore
from deepclean_hooks.guard.norm_statistics import NormStatistics
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks.fsdp import reshard

__all__ = ["Guard", "GuardError", "NormStatistics"]

_guarded: set[int] = set()  # id() of every parameter of an active guard, which keeps it alive


class Guard:
    """Holds every entry of `model` but the free ones at its bits until `release()`.

    `free` maps a name of the unwrapped model's `named_parameters()` to a bool tensor of the
    parameter's shape, True where an entry may train; a parameter without a mask is wholly frozen,
    trainable or not. Names, shapes or dtypes that do not fit raise ValueError before anything is
    hooked, a second guard on a parameter RuntimeError.

    What an optimizer remembers of these parameters from before is deleted when it first steps, for
    it holds what is to be forgotten; `clear_optimizer_state=False` keeps it, for a resumed run.
    Those in `optimizers` are cleared at once: pass a schedule-free optimizer that has already
    stepped (its `train()` writes what it remembers into the parameters), and any optimizer whose
    `step` torch's hooks do not see.

    With `norm_statistics="freeze"` running means and variances are held too, by evaluating those
    layers in eval mode; compiled models compile anew when that begins and ends.

    `before_step`, if given, is called before each step of an optimizer of the model reads its
    gradients, and may add to them; what it adds is masked like the rest.

    The guard owns a copy of the tensors that have frozen entries, and 1 byte for each entry of
    those that are partly free. A guard that is garbage collected releases itself.
    """

    def __init__(
        self,
        model: nn.Module,
        free: Mapping[str, Tensor],
        *,
        norm_statistics: NormStatistics = "update",
        clear_optimizer_state: bool = True,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        before_step: BeforeStep | None = None,
    ) -> None:
        self.steps = 0  # optimizer steps seen that touched a parameter of the model
        self._model = unwrap(model)
        parameters = dict(self._model.named_parameters())
        _require_masks_fit(parameters, free)
        statistics.require_choice(norm_statistics)
        require_unguarded(parameters)
        self._clear_state = clear_optimizer_state
        # Strong references: weak ones block torch.utils.swap_tensors, and a parameter kept alive
        # keeps its id() to itself (a stale id once overwrote 15 of 30 unrelated new parameters).
        self._ours = {id(parameter): parameter for parameter in parameters.values()}
        self._held = _held(parameters, free)
        self._compact: Compact | None = None
        norms = statistics.norms(self._model) if norm_statistics == "freeze" else {}
        self._statistics = statistics.StatisticsSnapshot(norms)
        self._met: weakref.WeakSet[Any] = weakref.WeakSet()
        self._begun: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._stepped: weakref.WeakSet[Any] = weakref.WeakSet()
        self._hidden: weakref.WeakKeyDictionary[Any, list[tuple[Tensor, Tensor]]]
        self._hidden = weakref.WeakKeyDictionary()
        self._judged: set[type] = set()
        self._saw_gradient = False
        self._added = None if before_step is None else Added(before_step, weakly(self._mask_again))
        self._undo = contextlib.ExitStack()
        self._release = weakref.finalize(self, self._undo.close)
        self._start(norms.values(), optimizers)

    def _start(self, norms: Collection[nn.Module], optimizers: Iterable[Any]) -> None:
        try:
            self._hook(norms)
            for optimizer in optimizers:
                self._meet(known.unwrapped(optimizer))
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Removes all hooks and copies; the model stays as it is. Safe to call twice."""
        self._release()
        self._ours.clear()
        self._held.clear()
        self._compact = None

    def compact(self) -> dict[str, nn.Parameter]:
        """The free entries as 1-D leaves by parameter name, to build an optimizer of your own on.

        What it remembers then has the size of the free entries. During the backward pass their
        gradients go to the leaves, and those of the model become None: clip the leaves. After each
        step of an optimizer of the leaves the model has their values.

        Raises ValueError in more than one process and for sharded parameters, and at the first step
        of an optimizer that needs whole tensors (Muon, Adafactor, LAMB, ...); RuntimeError at the
        step of an optimizer of the model's own parameters.
        """
        if not self._release.alive:
            raise RuntimeError("this guard was released; call compact() before release()")
        if self._compact is None:
            if ranks.world()[1] > 1:
                raise ValueError(
                    "compact() takes gradients before they are averaged over the "
                    f"{ranks.world()[1]} processes; build the optimizer on model.parameters(), "
                    "which the guard holds too"
                )
            compact = Compact(dict(self._model.named_parameters()), self._masks())
            gather = weakly(compact.gather)
            for parameter in compact.parameters():
                compact.gather(parameter)
                register = parameter.register_post_accumulate_grad_hook
                self._own(register(gather))  # type: ignore[no-untyped-call]  # untyped in torch
            self._compact = compact
        return dict(self._compact.leaves)

    def _masks(self) -> dict[str, Tensor]:
        masks = {}
        for name, parameter in self._model.named_parameters():
            held = self._held.get(id(parameter))
            if held is None:
                masks[name] = torch.ones_like(parameter, dtype=torch.bool)
            elif held.free is not None:
                masks[name] = held.free != 0
        return masks

    def moved(self) -> dict[str, int]:
        """How many frozen entries of each parameter have moved, by name; only names with any.

        Counted bit by bit from when the guard was set. Compared with what the model has under each
        name now, so a parameter replaced by another object counts too, and all entries of one that
        is gone. Frozen norm statistics count under their buffer names. Under FSDP2 each rank counts
        its own shard. Raises RuntimeError after `release()`.
        """
        now = self._parameters_now()
        counts = {
            held.name: held.moved(now[held.name]) if held.name in now else held.count()
            for held in self._held.values()
        }
        counts = {name: count for name, count in counts.items() if count}
        return {**counts, **self._statistics.moved()}

    def check(self) -> None:
        """Raises GuardError if an entry moved or is no longer held: which, why and the way out."""
        counts, now = self.moved(), self._parameters_now()
        replaced = [
            held.name for held in self._held.values() if now.get(held.name) is not held.parameter
        ]
        problems = []
        if counts:
            listed = [f"{name} ({count})" for name, count in counts.items()]
            problems.append(f"{sum(counts.values())} frozen entries moved: {_some(listed)}")
        if replaced:
            problems.append(
                f"replaced by other objects since the guard was set: {_some(replaced)}; set the "
                "guard after what replaces them (fully_shard(), Accelerator.prepare(), setattr)"
            )
        if self._saw_gradient and not self.steps:
            problems.append(
                "gradients were computed but no optimizer step was seen: `step` is set on the "
                "optimizer's instance, or its class does not call torch.optim.Optimizer.__init__; "
                "pass it as Guard(..., optimizers=[optimizer])"
            )
        elif counts and not replaced:
            problems.append(
                "something wrote to them outside the steps that were seen: an optimizer whose "
                "`step` is set on the instance (pass it as Guard(..., optimizers=[optimizer])), "
                "load_state_dict() or another write in place"
            )
        if problems:
            raise GuardError("; ".join(problems))

    def _parameters_now(self) -> dict[str, nn.Parameter]:
        if not self._release.alive:
            raise RuntimeError("this guard was released; ask it before release()")
        reshard(self._model)
        return dict(self._model.named_parameters())

    def _hook(self, norms: Collection[nn.Module]) -> None:
        _guarded.update(self._ours)
        self._undo.callback(_guarded.difference_update, set(self._ours))
        for held in self._held.values():
            held.mask_gradient()
            if held.parameter.requires_grad:
                # Not Tensor.register_hook: it never fires under FSDP2. Not a step pre-hook:
                # clipping comes earlier, and W_f then ends 3e-2 to 4e-1 (relative) away from
                # training it alone.
                mask = weakly(self._mask_gradient)
                register = held.parameter.register_post_accumulate_grad_hook
                self._own(register(mask))  # type: ignore[no-untyped-call]  # untyped in torch
        # Global: an optimizer made later is held too, and these run after the hooks of the
        # optimizer itself.
        self._own(register_optimizer_step_pre_hook(weakly(self._before_step)))
        self._own(register_optimizer_step_post_hook(weakly(self._after_step)))
        if norms:
            self._hook_norms(norms)

    def _hook_norms(self, norms: Collection[nn.Module]) -> None:
        statistics.forget_compiled()
        self._undo.callback(statistics.forget_compiled)
        quiet = statistics.EvalDuringForward()
        for module in norms:
            self._own(module.register_forward_pre_hook(quiet.before))
            self._own(module.register_forward_hook(quiet.after, always_call=True))

    def _own(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._undo.callback(handle.remove)

    def _mask_gradient(self, parameter: Tensor) -> None:
        self._saw_gradient = True
        if self._compact is None:
            self._held[id(parameter)].mask_gradient()
        elif self._held[id(parameter)].free is None:
            parameter.grad = None

    def _mask_again(self, optimizer: Any) -> None:
        for held in self._held_of(optimizer):
            held.mask_gradient()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Call | None:
        call = None
        if self._compact is not None:
            self._require_compact(optimizer, self._compact)
        if self._touches(optimizer):
            if optimizer not in self._met:
                self._meet(known.stepping_around(optimizer), stepping=True)
            self._begun[optimizer] = self.steps
            if self._added is not None:
                call = self._added.begin(optimizer, self._stepped_by(optimizer), args, kwargs)
            self._hide(optimizer)
        return call

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for tensor, grad in self._hidden.pop(optimizer, ()):
            if tensor.grad is None:
                tensor.grad = grad
        self._restore(optimizer)
        # Not where an optimizer that this one steps was counted in between: that was the same step.
        if self._begun.pop(optimizer, None) == self.steps:
            self.steps += self._touches(optimizer)

    @contextlib.contextmanager
    def _following(self, optimizer: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        seen = self.steps
        if name == "step" and self._added is not None and self._touches(optimizer):
            self._added.begin_unseen(optimizer, self._stepped_by(optimizer), args, kwargs)
        try:
            yield
        finally:
            self._restore(optimizer)
            if name == "step" and self.steps == seen:
                self.steps += self._touches(optimizer)

    def _touches(self, optimizer: Any) -> bool:
        if self._compact is not None and self._compact.serves(optimizer):
            return True
        return any(id(tensor) in self._ours for tensor in known.tensors_of(optimizer))

    def _stepped_by(self, optimizer: Any) -> dict[str, Tensor]:
        """The tensors that an optimizer steps, by the parameter's name; leaves in compact mode."""
        ids = {id(tensor) for tensor in known.tensors_of(optimizer)}
        named: dict[str, Tensor] = dict(self._model.named_parameters())
        leaves = {} if self._compact is None else self._compact.leaves
        return {name: t for name, t in {**named, **leaves}.items() if id(t) in ids}

    def _require_compact(self, optimizer: Any, compact: Compact) -> None:
        if any(id(tensor) in self._ours for tensor in known.tensors_of(optimizer)):
            raise RuntimeError(
                f"{type(optimizer).__name__} steps parameters of the model, whose gradients go to "
                "the tensors of compact() since that was called; build it on compact().values()"
            )
        if compact.serves(optimizer):
            compact.require_elementwise(optimizer)

    def _hide(self, optimizer: Any) -> None:
        """Takes the gradients of wholly frozen parameters away for the length of a step.

        An optimizer skips what has no gradient (4 % of a step of a ViT-tiny, AdamW in a loop). Not
        in its first step, which makes its state: strict loading of distributed checkpoints asks for
        that of every trainable parameter.
        """
        if optimizer in self._stepped:
            self._hidden[optimizer] = [
                (held.parameter, held.parameter.grad)
                for held in self._held_of(optimizer)
                if held.free is None and held.parameter.grad is not None
            ]
            for tensor, _ in self._hidden[optimizer]:
                tensor.grad = None
        self._stepped.add(optimizer)

    def _held_of(self, optimizer: Any) -> list[Held]:
        found = (self._held.get(id(tensor)) for tensor in known.tensors_of(optimizer))
        return [held for held in found if held is not None]

    def _restore(self, optimizer: Any) -> None:
        restore(self._held_of(optimizer))
        if self._compact is not None and self._compact.serves(optimizer):
            self._compact.scatter()

    def _meet(self, outer: Any, stepping: bool = False) -> None:
        """Clears, follows and judges an optimizer and those inside it, each when first seen."""
        clear = self._clear_state and not (stepping and known.shares_state(outer))
        if self._clear_state and not clear:
            warnings.warn(
                f"the state of {type(outer).__name__} was kept, for it is in use; if it has "
                "stepped before, pass it as Guard(..., optimizers=[optimizer]) to have it cleared",
                stacklevel=2,
            )
        for optimizer in known.layers(outer):
            if optimizer in self._met:
                continue
            self._met.add(optimizer)
            if clear:
                known.forget(optimizer, self._ours)
            if type(optimizer) not in self._judged:
                self._judged.add(type(optimizer))
                known.warn_if_coupled(optimizer)
            for name in known.unseen_writers(optimizer):
                self._undo.callback(follow(optimizer, name, weakly(self._following)))


def _held(parameters: Mapping[str, nn.Parameter], free: Mapping[str, Tensor]) -> dict[int, Held]:
    found = {}
    for name, parameter in parameters.items():
        mask = free.get(name)
        if mask is None or not bool(mask.all()):
            partly = mask is not None and bool(mask.any())
            found[id(parameter)] = Held(name, parameter, mask if partly else None)
    return found


def _require_masks_fit(parameters: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> None:
    problems = [f"{name}: no such parameter" for name in free if name not in parameters]
    for name, parameter in parameters.items():
        mask = free.get(name)
        if mask is not None and mask.dtype != torch.bool:
            problems.append(f"{name}: {mask.dtype}, not torch.bool")
        if mask is not None and mask.shape != parameter.shape:
            problems.append(f"{name}: shape {tuple(mask.shape)}, not {tuple(parameter.shape)}")
        if parameter.element_size() > 8:
            problems.append(f"{name}: {parameter.dtype} has no integer type of its width")
    if problems:
        raise ValueError(
            "free must map names of model.named_parameters() (a tied parameter goes by its first "
            f"one) to bool tensors of their shapes: {'; '.join(problems)}"
        )


def require_unguarded(parameters: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError if another guard holds any of these parameters."""
    taken = [name for name, parameter in parameters.items() if id(parameter) in _guarded]
    if taken:
        raise RuntimeError(
            f"already held by another guard: {_some(taken)}; call release() on that guard first, "
            "or leave its `with` block"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
