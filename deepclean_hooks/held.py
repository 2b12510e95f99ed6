"""One parameter some of whose entries keep their bits: what is stored, how it is put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepclean_hooks.bits import bits
from deepclean_hooks.shards import local, local_part

# Entries for which a mask is widened at a time on the CPU: 512 KiB of float32 stays in the cache.
# Gradient / restore, 11.0M float32 entries, 1 thread (channels_last: the same within 5 %):
#   1-byte mask in chunks of 2**17           5.8 /  9.9 ms   (of 2**13: 12 / 19 ms)
#   mask stored as int32, 4 bytes an entry   5.9 / 11.7 ms
#   1-byte mask promoted in one go            23 /   29 ms
#   boolean masked_fill_ / where(out=)        26 /   28 ms
CHUNK = 1 << 17


class GuardError(RuntimeError):
    """A frozen entry moved, or cannot be held any longer."""


class Held:
    """A parameter and the bits its frozen entries keep; 1 byte an entry more if some are free.

    Works on bits throughout: a product with a mask would make NaN of inf and lose the sign of -0.0.
    """

    def __init__(self, name: str, parameter: nn.Parameter, free: Tensor | None) -> None:
        """`free`: bool, of the parameter's (global) shape; None: every entry is frozen."""
        here = local(parameter)
        self.name = name
        self.parameter = parameter
        self.dtype = here.dtype
        # Bits to put back: those of the frozen entries, 0 for the free ones.
        self.frozen = bits(here).clone()
        # int8: -1, all ones when widened, where an entry is free; 0 where it is frozen. Laid out in
        # memory as the parameter is, so that both can be walked as one line.
        self.free: Tensor | None = None
        if free is not None:
            self.free = torch.empty_like(here, dtype=torch.int8)
            self.free.copy_(local_part(free, parameter)).neg_()
            _fill_frozen(self.frozen, self.free.bitwise_not(), None)

    def mask_gradient(self) -> None:
        """Sets the gradient of the frozen entries, if there is one, to +0.0 in place."""
        grad = self.parameter.grad
        if grad is None:
            return
        if grad.layout is not torch.strided:
            self.parameter.grad = self._masked_sparse(grad)
        elif self.free is None:
            local(grad).zero_()
        else:
            here = bits(local(grad))
            self._move_to(here.device)
            _fill_frozen(here, self.free, None)

    def _masked_sparse(self, grad: Tensor) -> Tensor:
        grad = grad.coalesce()
        at, values = grad.indices(), grad.values()  # (sparse dims, M), (M, *dense dims): its memory
        if self.free is None:
            values.zero_()
        else:
            values.masked_fill_(self.free[tuple(at)] == 0, 0)
        return grad

    def restore(self) -> None:
        """Puts the frozen entries back to their bits; GuardError if shape or dtype changed."""
        here = local(self.parameter)
        if here.dtype != self.dtype or here.shape != self.frozen.shape:
            raise GuardError(
                f"{self.name} was {self.dtype} {tuple(self.frozen.shape)} when the guard was set "
                f"and is {here.dtype} {tuple(here.shape)} now; convert or shard the model before"
            )
        self._move_to(here.device)
        if self.free is None:
            bits(here).copy_(self.frozen)
        else:
            _fill_frozen(bits(here), self.free, self.frozen)

    def moved(self, now: Tensor) -> int:
        """How many frozen entries have other bits in `now`; all if its shape or dtype differs."""
        here = local(now)
        if here.dtype != self.dtype or here.shape != self.frozen.shape:
            return self.count()
        self._move_to(here.device)
        differ = bits(here) != self.frozen
        if self.free is not None:
            differ &= self.free == 0
        return int(differ.sum())

    def count(self) -> int:
        """The number of frozen entries (of this rank's shard)."""
        return self.frozen.numel() if self.free is None else int((self.free == 0).sum())

    def _move_to(self, device: torch.device) -> None:
        if self.frozen.device != device:
            self.frozen = self.frozen.to(device)
            self.free = None if self.free is None else self.free.to(device)


def _fill_frozen(target: Tensor, free: Tensor, frozen: Tensor | None) -> None:
    """Writes `frozen` (None: 0) into the integers `target` wherever `free` is 0, in place."""
    in_line = free.stride() == target.stride()
    if target.device.type != "cpu" or not in_line or target.element_size() == 1:
        target.bitwise_and_(free)  # widened inside the kernel on a GPU
        if frozen is not None:
            target.bitwise_or_(frozen)
        return
    # A buffer of its own for each call: backward passes of two models may run in two threads.
    buffer = torch.empty(min(CHUNK, target.numel()), dtype=target.dtype)
    lines = _lines(target), _lines(free), _lines(target if frozen is None else frozen)
    for part, free_part, frozen_part in zip(*lines, strict=True):
        wide = buffer[: part.numel()].copy_(free_part)
        part.bitwise_and_(wide)
        if frozen is not None:
            part.bitwise_or_(frozen_part)


def _lines(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor without gaps as one line in the order of its memory, cut into chunks."""
    return torch.split(tensor.as_strided((tensor.numel(),), (1,)), CHUNK)
