"""Parameters some of whose entries keep their bits: what is stored, how it is put back."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from deepclean_hooks.ranks.shards import local, local_part
from deepclean_hooks.stored.bits import bits

# Entries worked on at a time on the CPU: 1 MiB of float32 stays in the cache. Gradient /
# restore, 11.0M float32 entries, 1 thread (channels_last: the same within 5 %):
#   1-byte mask in chunks of 2**17 (2**18)   5.8 /  9.9 ms   (of 2**13: 12 / 19 ms)
#   mask stored as int32, 4 bytes an entry   5.9 / 11.7 ms
#   1-byte mask promoted in one go            23 /   29 ms
#   boolean masked_fill_ / where(out=)        26 /   28 ms
CHUNK = 1 << 18
# Entries whose masks are widened at a time elsewhere: 64 MiB beside float32 parameters.
GROUP = 1 << 24


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
        # Of the parameter when its bits were last known, and how often it was another since.
        self.version, self.looks = parameter._version, 0
        # Bits to put back: those of the frozen entries, 0 for the free ones.
        self.frozen = bits(here).clone()
        # int8: -1, all ones when widened, where an entry is free; 0 where it is frozen. Laid out in
        # memory as the parameter is, so that both can be walked as one line.
        self.free: Tensor | None = None
        if free is not None:
            self.free = torch.empty_like(here, dtype=torch.int8)
            self.free.copy_(local_part(free, parameter)).neg_()
            self.frozen.bitwise_and_(self.free.bitwise_not())
        self._take(here)

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
            lines = _lines(here) if _in_line(here, self.free) else ()
            if lines and len(lines) == len(self._free_lines):
                for part, mask in zip(lines, self._free_lines, strict=True):
                    part.bitwise_and_(_widened(mask, part.dtype))
            else:
                here.bitwise_and_(self.free)  # widened inside the kernel on a GPU

    def _masked_sparse(self, grad: Tensor) -> Tensor:
        grad = grad.coalesce()
        at, values = grad.indices(), grad.values()  # (sparse dims, M), (M, *dense dims): its memory
        if self.free is None:
            values.zero_()
        else:
            values.masked_fill_(self.free[tuple(at)] == 0, 0)
        return grad

    def here(self) -> Tensor:
        """The parameter's memory as integers, the frozen bits beside it on the same device.

        Raises GuardError if shape or dtype changed.
        """
        here = local(self.parameter)
        # The view that is kept keeps its memory too: the same address is the same tensor.
        if _place(here) != self._place:
            if here.dtype != self.dtype or here.shape != self.frozen.shape:
                raise GuardError(
                    f"{self.name} was {self.dtype} {tuple(self.frozen.shape)} when the guard was "
                    f"set and is {here.dtype} {tuple(here.shape)} now; convert or shard the model "
                    "before"
                )
            self._take(here)
        self._move_to(here.device)
        return self._here

    def restore(self) -> None:
        """Puts the frozen entries back to their bits; GuardError if shape or dtype changed."""
        here = self.here()
        if self.free is None:
            here.copy_(self.frozen)
        elif self._lines:
            in_step = zip(self._lines, self._free_lines, self._frozen_lines, strict=True)
            for part, free, frozen in in_step:
                # part * 1 + 0 or part * 0 + frozen, exact in integers: a single pass, 3.6 ms where
                # `and`, then `or` take 4.7 (5.5M float32 entries).
                torch.addcmul(frozen, part, _widened(free, part.dtype), value=-1, out=part)
        else:
            here.bitwise_and_(self.free).bitwise_or_(self.frozen)

    def _take(self, here: Tensor) -> None:
        self._place, self._here = _place(here), bits(here)
        self._lay_out()

    def _lay_out(self) -> None:
        """Cuts parameter, mask and frozen bits into lines, if they can be walked in step."""
        self._lines: tuple[Tensor, ...] = ()
        self._free_lines: tuple[Tensor, ...] = ()
        self._frozen_lines: tuple[Tensor, ...] = ()
        if self.free is not None and _in_line(self._here, self.free):
            self._lines, self._free_lines = _lines(self._here), _lines(self.free)
            self._frozen_lines = _lines(self.frozen)

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

    def changed(self, entries: int | None = None) -> int:
        """How many frozen entries have another value, among about so many of the first rows.

        A zero of the other sign is none: adding a masked gradient of 0 by hand makes +0.0 of -0.0.
        """
        here, frozen, free = self.here(), self.frozen, self.free
        if entries is not None and here.numel() > entries:
            rows = max(1, entries * len(here) // here.numel())
            here, frozen = here[:rows], frozen[:rows]
            free = None if free is None else free[:rows]
        differ = here != frozen
        if free is not None:
            differ &= free == 0
        if not bool(differ.any()):
            return 0
        return int((differ & ((here << 1 != 0) | (frozen << 1 != 0))).sum())

    def count(self) -> int:
        """The number of frozen entries (of this rank's shard)."""
        return self.frozen.numel() if self.free is None else int((self.free == 0).sum())

    def _move_to(self, device: torch.device) -> None:
        if self.frozen.device != device:
            self.frozen = self.frozen.to(device)
            self.free = None if self.free is None else self.free.to(device)
            self._lay_out()


def restore(held: Iterable[Held]) -> None:
    """Puts the frozen entries of all of these back to their bits.

    Raises GuardError if the shape or dtype of a parameter changed.
    """
    together = list(held)
    whole: dict[torch.device, list[Held]] = {}
    partly: dict[tuple[torch.device, torch.dtype], list[Held]] = {}
    for each in together:
        here = each.here()
        if each.free is None:
            whole.setdefault(here.device, []).append(each)
        elif here.device.type == "cpu":
            each.restore()
        else:
            partly.setdefault((here.device, here.dtype), []).append(each)
    for alike in whole.values():
        torch._foreach_copy_([each.here() for each in alike], [each.frozen for each in alike])
    for alike in partly.values():
        for group in groups(alike):
            restore_together(group)
    for each in together:
        each.version = each.parameter._version


def groups(held: Iterable[Held]) -> list[list[Held]]:
    """The same in the same order, cut so that a group has `GROUP` entries or a single parameter."""
    cut: list[list[Held]] = []
    size = GROUP
    for each in held:
        if size + each.frozen.numel() > GROUP:
            cut.append([])
            size = 0
        cut[-1].append(each)
        size += each.frozen.numel()
    return cut


def restore_together(held: Sequence[Held]) -> None:
    """Puts the frozen entries of partly free parameters back: three kernels on a GPU.

    All of one dtype on one device. Takes memory of the size of the parameters while it runs.
    """
    here = [each.here() for each in held]
    wide = [torch.empty_like(tensor) for tensor in here]
    torch._foreach_copy_(wide, [each.free for each in held if each.free is not None])
    # There is no foreach kernel for `and`. A product of integers with 1 or 0 and a sum with 0 are
    # exact.
    torch._foreach_neg_(wide)
    torch._foreach_mul_(here, wide)
    torch._foreach_add_(here, [each.frozen for each in held])


def _in_line(target: Tensor, free: Tensor) -> bool:
    """Whether to walk them in chunks: on the CPU, laid out alike, wider than the mask."""
    return (
        target.device.type == "cpu"
        and target.stride() == free.stride()
        and target.element_size() > 1
    )


class _Buffers(threading.local):
    """Room for one widened chunk, for each thread: two models may be in backward passes at once.

    Kept: fresh memory is handed out page by page, which took as long as the work itself.
    """

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


def _widened(free: Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk of a mask in a wider integer type, until the next call in this thread."""
    buffer = _buffers.by_dtype.get(dtype)
    if buffer is None or buffer.numel() < free.numel():
        buffer = _buffers.by_dtype[dtype] = torch.empty(CHUNK, dtype=dtype)
    return buffer.narrow(0, 0, free.numel()).copy_(free)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _lines(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor without gaps as one line in the order of its memory, cut into chunks."""
    line = tensor.as_strided((tensor.numel(),), (1,))
    return (line,) if line.numel() <= CHUNK else torch.split(line, CHUNK)
