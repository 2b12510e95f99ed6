"""Walk a data set once, on all ranks, each sample once; leave no trace on the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.model import derived, random_state, recomputing, switches
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks import fsdp


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter (or buffer) lives; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def require_precision(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Raises ValueError for sums in a precision that the model's device does not have."""
    device = device_of(model)
    if device.type == "mps" and dtype == torch.float64:
        raise ValueError(
            f"the sums are float64, which the model's device {device} does not have; move the "
            "model to the CPU to measure (model.cpu()), or pass accumulate=torch.float32 where "
            "that is offered"
        )


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Puts every module in train mode, and each back into its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, was in modes:
            module.training = was


def drop_caches(model: nn.Module) -> None:
    """Drops what modules keep of derived weights between eval passes, by way of `train()`; modes
    stay as they are."""
    with training(model):
        pass


@contextlib.contextmanager
def no_trace(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the unwrapped model in eval mode, gradients on, autocast off, nothing compiled; then
    puts all back.

    Put back, after an exception too: the train/eval mode of every module, requires_grad, buffers
    bit for bit, the tensors that modules keep elsewhere (LeViT its attention biases), the
    random state of torch (on the CPU and on the model's GPU), numpy and Python, TF32. `.grad` is
    never written in between: measuring uses `torch.autograd.grad`. A second thread with the same
    model waits.
    """
    inner = unwrap(model)
    with switches.alone(inner):
        yield from _no_trace(inner)


def _no_trace(inner: nn.Module) -> Iterator[nn.Module]:
    fsdp.settle(inner)
    modes = [(module, module.training) for module in inner.modules()]
    wants = [(p, p.requires_grad) for p in inner.parameters()]
    held = {name: buffer.detach().clone() for name, buffer in inner.named_buffers()}
    devices = [device_of(inner)] if device_of(inner).type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state.kept(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device_of(inner).type, enabled=False))
        stack.enter_context(whole_float32())
        # A compiled region is opaque to the interception of torch functions: 2 or more graphs, no
        # parameters.
        stack.enter_context(_nothing_compiled())
        stack.enter_context(_own_forward(inner))
        try:
            inner.train()  # drops caches of derived weights that an earlier eval pass left behind
            inner.eval()
            stack.enter_context(derived.kept(inner))
            ranks.share_buffers(inner)
            stack.enter_context(recomputing.off(inner))
            yield inner
        finally:
            fsdp.settle(inner)
            inner.train()
            for module, training in modes:
                module.training = training
            for p, wanted in wants:
                p.requires_grad_(wanted)
            _put_back(inner, held)


@contextlib.contextmanager
def own_precision(model: nn.Module, *, evaluates: bool) -> Iterator[torch.dtype | None]:
    """Lets a pass of the unwrapped model run beside a training loop's: without autocast, with a
    random state of its own, in eval mode if `evaluates`. Yields what floating-point inputs have to
    become: the weights' type where that is half, else None."""
    modes = [(module, module.training) for module in model.modules()] if evaluates else []
    device = device_of(model)
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    with contextlib.ExitStack() as stack:
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(random_state.kept(devices=devices))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_own_forward(model))
        try:
            if modes:
                model.train().eval()  # drops caches of derived weights, as in `no_trace`
            yield kind if kind in (torch.float16, torch.bfloat16) else None
        finally:
            if modes:
                model.train()
            for module, was in modes:
                module.training = was


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        flags = matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:  # set by way of fp32_precision (torch 2.9), which bars reading these
        # Any: the oldest supported torch has none of them.
        precise: tuple[Any, ...] = (matmul, *(getattr(cudnn, part) for part in ("conv", "rnn")))
        were = [part.fp32_precision for part in precise]
        try:
            for part in precise:
                part.fp32_precision = "ieee"
            yield
        finally:
            for part, was in zip(precise, were, strict=True):
                part.fp32_precision = was
        return
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = flags


# TF32 keeps 10 of float32's 23 fraction bits in products.
whole_float32 = switches.Switch(_without_tf32)
_nothing_compiled = switches.Switch(lambda: torch.compiler.set_stance("force_eager"))


@contextlib.contextmanager
def float32_weights(model: nn.Module) -> Iterator[torch.dtype | None]:
    """Lets half-precision weights and buffers be float32 copies for a while; yields float32, or
    None if none was half.

    In bfloat16 the Fisher's median relative error is 3.6 %, and 2 % of the entries change side at
    gamma 1.1 to 2.
    """
    half = (torch.float16, torch.bfloat16)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in half]
    originals = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield torch.float32 if tensors else None
    finally:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.data = original


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Takes off for a while the autocast that Accelerate's mixed precision puts into `forward`.

    It is inside, so autocast switched off around the model has no effect on it: logits were off by
    1.2e-3, and 107 of 23 652 entries changed side.
    """
    patched, original = vars(model).get("forward"), vars(model).get("_original_forward")
    if patched is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = patched


def _put_back(model: nn.Module, held: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in held and buffer.shape == held[name].shape:
                buffer.copy_(held[name])
