"""From the operand w' of an operation back to the parameters p it was made of: w' = f(p).

N: samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from deepclean_hooks.persample.plan import leaves
from deepclean_hooks.persample.rule import Carried


def squares_through(
    operand: Tensor, squares: Tensor, parameters: Mapping[str, Tensor], names: Mapping[int, str]
) -> Iterator[tuple[str, Tensor]]:
    """The sum of squares of an operand that is a selection of entries of one parameter, for that
    parameter."""
    for name in leaves(operand, names):
        cotangent = squares.to(operand.dtype).reshape(operand.shape)
        (back,) = torch.autograd.grad(operand, parameters[name], cotangent, retain_graph=True)
        yield name, back


def per_sample_through(
    pulled: Iterable[tuple[Tensor, Tensor | Carried]],
    parameters: Mapping[str, Tensor],
    names: Mapping[int, str],
    n: int,
) -> dict[str, Tensor]:
    """The gradient of each sample, (N, *parameter.shape), summed over all uses of the parameter."""
    total: dict[str, Tensor] = {}
    for operand, each in pulled:
        for name, back in _through(operand, each, parameters, names, n):
            total[name] = total[name] + back if name in total else back
    return total


def _through(
    operand: Tensor,
    each: Tensor | Carried,
    parameters: Mapping[str, Tensor],
    names: Mapping[int, str],
    n: int,
) -> Iterator[tuple[str, Tensor]]:
    sources = [name for name in leaves(operand, names) if name in parameters]
    if not sources:
        return
    wanted = [parameters[name] for name in sources]
    if id(operand) in names:
        assert isinstance(each, Tensor)
        yield sources[0], each.reshape(n, *operand.shape)
    elif isinstance(each, Tensor):
        cotangents = each.reshape(n, *operand.shape).to(operand.dtype)
        yield from zip(sources, _batched(operand, wanted, cotangents), strict=True)
    else:
        alone = (each.layout.only(each.grad, i, n) for i in range(n))
        yield from zip(sources, _stacked(operand, wanted, alone), strict=True)


def _batched(operand: Tensor, wanted: list[Tensor], cotangents: Tensor) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(
            operand, wanted, cotangents, retain_graph=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation of f without a batching rule
        return _stacked(operand, wanted, cotangents)


def _stacked(
    operand: Tensor, wanted: list[Tensor], cotangents: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    each = [torch.autograd.grad(operand, wanted, c, retain_graph=True) for c in cotangents]
    return tuple(torch.stack(gradients) for gradients in zip(*each, strict=True))
