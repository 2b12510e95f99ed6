"""New values that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepclean_hooks.methods.method import Method, Selection
from deepclean_hooks.model import no_trace
from deepclean_hooks.ranks import fsdp, shards


@contextmanager
def put_back_on_error(
    model: nn.Module, method: Method, selection: Selection
) -> Iterator[dict[str, Tensor]]:
    """Yields copies of the parameters of an unwrapped model that the method will write; whatever
    ends the block puts all that was written back, bit for bit."""
    parameters = fsdp.parameters_of(model)
    touched: dict[str, Tensor] = {
        name: parameters[name] for name, mask in selection.masks.items() if shards.any_true(mask)
    }
    buffers = dict(model.named_buffers()) if method.resets_buffers else {}
    old = {name: shards.local(tensor).clone() for name, tensor in touched.items()}
    held = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        yield old
    except BaseException:
        with torch.no_grad():
            for name, tensor in old.items():
                shards.local(touched[name]).copy_(tensor)
            for name, tensor in held.items():
                buffers[name].copy_(tensor)
        no_trace.drop_caches(model)
        raise
