"""A guard's hooks: gradients are masked in the backward pass, frozen bits put back after a step."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from deepclean_hooks.guard import optimizers as kinds
from deepclean_hooks.guard.added import Added, BeforeStep, Call
from deepclean_hooks.guard.compact import Compact
from deepclean_hooks.guard.follow import follow
from deepclean_hooks.guard.held import GuardError, Held, restore
from deepclean_hooks.guard.unseen import UnseenWrites


@dataclass(eq=False)
class _Record:
    """What is remembered of an optimizer that stepped the model."""

    begun: int | None = None  # the count of steps when the step under way began
    has_state: bool = False  # its first step, which makes its state, has begun
    hidden: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # parameter, its gradient

    def give_back(self) -> None:
        """Returns the gradients that were hidden for the length of a step."""
        for parameter, grad in self.hidden:
            if parameter.grad is None:
                parameter.grad = grad
        self.hidden = []


class Steps:
    """Sees every backward pass and optimizer step of one guard's parameters, until `close()`.

    Does not know its guard, so that hooks keep no guard alive.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        held: dict[int, Held],
        unseen: UnseenWrites,
        *,
        clear_state: bool,
        before_step: BeforeStep | None = None,
    ) -> None:
        """`held` by id() of the parameter."""
        self.count = 0  # optimizer steps that touched a parameter of the model
        self.saw_gradient = False
        self.owned: set[int] = set()  # id() of parameters in a group of an optimizer that stepped
        self.reached: set[int] = set()  # those of them that had a gradient at a step
        self.compact: Compact | None = None
        # Strong references: weak ones block torch.utils.swap_tensors, and a parameter kept alive
        # keeps its id() to itself (a stale id once overwrote 15 of 30 unrelated new parameters).
        self._parameters = {id(parameter): parameter for parameter in parameters.values()}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._held, self._unseen, self._clear_state = held, unseen, clear_state
        self._added = None if before_step is None else Added(before_step, self._mask_again)
        self._stepping = False  # a step is under way, whose closure may run backward passes
        self._records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()
        self._undo = contextlib.ExitStack()

    def begin(self) -> None:
        """Masks the gradients that are there, and registers the hooks."""
        for held in self._held.values():
            held.mask_gradient()
            self._hook_gradient(held.parameter, self._mask)
        _all_steps.add(self)
        self._undo.callback(_all_steps.remove, self)

    def close(self) -> None:
        """Takes all hooks off; a step that was aborted half-way is put right. Safe twice."""
        self._undo.close()
        for optimizer, record in list(self._records.items()):
            record.give_back()
            if record.begun is not None:
                # Nothing more can be done for what was converted in between; `check` names it.
                with contextlib.suppress(GuardError):
                    self._restore(optimizer)
        self._records.clear()
        self._parameters.clear()

    def use_compact(self, compact: Compact) -> None:
        """From now on gradients of the free entries go to the leaves."""
        for parameter in compact.parameters():
            compact.gather(parameter)
            self._hook_gradient(parameter, compact.gather)
        self.compact = compact

    def meet(self, outer: Any, *, stepping: bool = False) -> None:
        """Clears, follows and judges an optimizer and those inside it, each when first seen."""
        clear = self._clear_state and not (stepping and kinds.shares_state(outer))
        if self._clear_state and not clear:
            warnings.warn(
                f"the state of {type(outer).__name__} was kept, for it is in use; if it has "
                "stepped before, pass it as Guard(..., optimizers=[optimizer]) to have it cleared",
                stacklevel=2,
            )
        for optimizer in kinds.layers(outer):
            if optimizer in self._records:
                continue
            if clear:
                kinds.forget(optimizer, self._parameters)
            if all(type(known) is not type(optimizer) for known in self._records):
                kinds.warn_if_coupled(optimizer)
            self._records[optimizer] = _Record()
            for name in kinds.unseen_writers(optimizer):
                self._undo.callback(follow(optimizer, name, self._following))

    def before(self, optimizer: Any, args: tuple[Any, ...], kwargs: Any) -> Call | None:
        """A step of any optimizer begins; returns the call to make instead of it, if another."""
        if self.compact is not None:
            self._require_compact(optimizer, self.compact)
        touched = self._touched(optimizer)
        if not touched:
            return None
        if optimizer not in self._records:
            outer = kinds.stepping_around(optimizer)
            self.meet(outer, stepping=True)
            if outer is not optimizer:
                self._records[outer].begun = self.count  # followed from its next step on
        record = self._records.setdefault(optimizer, _Record())
        record.give_back()  # where the step before was aborted
        record.begun = self.count
        self._stepping = True
        call = None
        if self._added is not None:
            call = self._added.begin(optimizer, self._stepped_by(optimizer), args, kwargs)
        self._note(touched)
        self._hide(optimizer, record)
        return call

    def after(self, optimizer: Any) -> None:
        """A step of any optimizer ends."""
        self._end(optimizer, counted=True)

    @contextlib.contextmanager
    def _following(self, optimizer: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        self._records.setdefault(optimizer, _Record()).begun = self.count
        self._stepping = True
        try:
            if name == "step" and self._added is not None and self._touched(optimizer):
                self._added.begin_unseen(optimizer, self._stepped_by(optimizer), args, kwargs)
            yield
        finally:
            self._end(optimizer, counted=name == "step")

    def _end(self, optimizer: Any, *, counted: bool) -> None:
        touched = self._restore(optimizer)
        record = self._records.get(optimizer)
        if record is None:
            return
        record.give_back()
        if counted:
            self._note(touched)
            # Not where an optimizer that this one steps was counted in between: the same step.
            self.count += bool(touched) and record.begun == self.count
        record.begun = None
        self._stepping = any(known.begun is not None for known in self._records.values())

    def _hook_gradient(self, parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> None:
        # Not Tensor.register_hook: it never fires under FSDP2. Not a step pre-hook: clipping comes
        # earlier, and W_f then ends 3e-2 to 4e-1 (relative) away from training it alone.
        # Also where no gradient is asked for now: the loop may unfreeze a layer later. torch hooks
        # only what requires a gradient; the hook stays when the flag is put back.
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return
        required = parameter.requires_grad
        parameter.requires_grad_(True)
        try:
            register: Any = parameter.register_post_accumulate_grad_hook
            handle = register(_outside_graphs(hook))
        finally:
            parameter.requires_grad_(required)
        self._undo.callback(handle.remove)

    def _mask(self, parameter: Tensor) -> None:
        self.saw_gradient = True
        held = self._held[id(parameter)]
        if self.compact is None:
            held.mask_gradient()
        elif held.free is None:
            parameter.grad = None
        if not self._stepping:
            self._unseen.look(held)

    def _mask_again(self, optimizer: Any) -> None:
        for held in self._held_of(optimizer):
            held.mask_gradient()

    def _touched(self, optimizer: Any) -> list[nn.Parameter]:
        """The parameters of the model that an optimizer steps, through compact leaves too."""
        touched = [
            self._parameters[id(tensor)]
            for tensor in kinds.tensors_of(optimizer)
            if id(tensor) in self._parameters
        ]
        return touched + (self.compact.stepped_by(optimizer) if self.compact is not None else [])

    def _stepped_by(self, optimizer: Any) -> dict[str, Tensor]:
        """The tensors that an optimizer steps, by the parameter's name; leaves in compact mode."""
        ids = {id(tensor) for tensor in kinds.tensors_of(optimizer)}
        named: dict[str, Tensor] = {self._names[key]: p for key, p in self._parameters.items()}
        leaves = {} if self.compact is None else self.compact.leaves
        return {name: t for name, t in {**named, **leaves}.items() if id(t) in ids}

    def _note(self, touched: Iterable[nn.Parameter]) -> None:
        for parameter in touched:
            self.owned.add(id(parameter))
            if parameter.grad is not None or (
                self.compact is not None and self.compact.has_gradient(parameter)
            ):
                self.reached.add(id(parameter))

    def _require_compact(self, optimizer: Any, compact: Compact) -> None:
        if any(id(tensor) in self._parameters for tensor in kinds.tensors_of(optimizer)):
            raise RuntimeError(
                f"{type(optimizer).__name__} steps parameters of the model, whose gradients go to "
                "the tensors of compact() since that was called; build it on compact().values()"
            )
        if compact.stepped_by(optimizer):
            compact.require_elementwise(optimizer)

    def _hide(self, optimizer: Any, record: _Record) -> None:
        """Takes the gradients of wholly frozen parameters away for the length of a step.

        An optimizer skips what has no gradient (4 % of a step of a ViT-tiny, AdamW in a loop). Not
        in its first step, which makes its state: strict loading of distributed checkpoints asks for
        that of every trainable parameter.
        """
        if record.has_state:
            record.hidden = [
                (held.parameter, held.parameter.grad)
                for held in self._held_of(optimizer)
                if held.free is None and held.parameter.grad is not None
            ]
            for parameter, _ in record.hidden:
                parameter.grad = None
        record.has_state = True

    def _held_of(self, optimizer: Any) -> list[Held]:
        looked_up = (self._held.get(id(tensor)) for tensor in kinds.tensors_of(optimizer))
        return [held for held in looked_up if held is not None]

    def _restore(self, optimizer: Any) -> list[nn.Parameter]:
        """Puts frozen bits back after a step; returns the parameters that it touched."""
        restore(self._held_of(optimizer))
        touched = self._touched(optimizer)
        if self.compact is not None and touched:
            self.compact.scatter()
        return touched


def _outside_graphs(hook: Callable[..., Any]) -> Any:
    """The hook as torch.compile leaves it alone: traced into a compiled training step, its writes
    through views fail. 0.8 us a call."""
    disable: Any = torch.compiler.disable
    return disable(hook)


class _AllSteps:
    """The steps of all guards behind a single pair of torch's global hooks.

    A single pair, because torch walks its registry while it calls the hooks: a guard that came or
    went in another thread meanwhile would make the step fail ("mutated during iteration"). Global,
    so that an optimizer made later is seen too, and after the hooks of the optimizer itself.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: a guard may be collected while it is held
        self._guarded: tuple[Steps, ...] = ()
        self._handles: tuple[torch.utils.hooks.RemovableHandle, ...] = ()

    def add(self, steps: Steps) -> None:
        with self._lock:
            if not self._guarded:
                self._handles = (
                    register_optimizer_step_pre_hook(_outside_graphs(self._before)),
                    register_optimizer_step_post_hook(_outside_graphs(self._after)),
                )
            self._guarded = (*self._guarded, steps)

    def remove(self, steps: Steps) -> None:
        with self._lock:
            self._guarded = tuple(kept for kept in self._guarded if kept is not steps)
            if not self._guarded:
                for handle in self._handles:
                    handle.remove()
                self._handles = ()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Call | None:
        instead = None
        for steps in self._guarded:
            call = steps.before(optimizer, args, kwargs)
            if call is not None:
                args, kwargs = instead = call
        return instead

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for steps in self._guarded:
            steps.after(optimizer)


_all_steps = _AllSteps()
