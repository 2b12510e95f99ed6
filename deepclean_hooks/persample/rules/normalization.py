"""y = x_hat w + b: the gradient of sample n is the sum over its positions of g x_hat (weight) and
of g (bias).

N: samples, R: maps of a sample, C: channels, T: positions. x_hat is the normalised input: by
running statistics (BatchNorm in eval mode), or by statistics of the sample itself (LayerNorm,
GroupNorm, InstanceNorm, RMSNorm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclean_hooks.persample.call import Call, Handlers
from deepclean_hooks.persample.layout import Layout, Unserved
from deepclean_hooks.persample.rule import Carried, Rule


class BatchNorm(Rule):
    """Operands: weight (C,) and bias (C,), normalised by running statistics."""

    def __init__(
        self,
        operands: dict[str, Tensor],
        n: int,
        x: Tensor,
        layout: Layout,
        statistics: tuple[Tensor, Tensor, Tensor | None, float],
    ) -> None:
        super().__init__(operands, n, x)
        self.layout, self.statistics = layout, statistics

    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        g, x = self.layout.images(grad, self.n), self.layout.images(self.saved, self.n)
        channels = g.shape[2]
        each = self._folded(g, x, channels) if g.shape[1] == 1 else self._direct(g, x, channels)
        return {name: each[name] for name in names}

    def _folded(self, g: Tensor, x: Tensor, channels: int) -> dict[str, Tensor | Carried]:
        """The samples folded into the channels: one native call gives every sample's sums."""
        mean, var, weight, eps = self.statistics
        # Contiguous, because the native backward is wrong for a batch of one with channels-last
        # gradients.
        flat = [t.reshape(1, self.n * channels, -1).contiguous() for t in (g, x)]
        scale = None if weight is None else weight.repeat(self.n)
        _, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            *flat,
            scale,
            mean.repeat(self.n),
            var.repeat(self.n),
            None,
            None,
            False,
            eps,
            [False, True, True],
        )
        return {
            "weight": by_weight.view(self.n, channels),
            "bias": by_bias.view(self.n, channels),
        }

    def _direct(self, g: Tensor, x: Tensor, channels: int) -> dict[str, Tensor | Carried]:
        mean, var, _, eps = self.statistics
        g = g.flatten(3) if g.dim() > 3 else g[..., None]  # (N, R, C, T)
        x = x.reshape(g.shape)
        x_hat = (x - mean[:, None]) * (var[:, None] + eps).rsqrt()
        return {"weight": (g * x_hat).sum((1, 3)), "bias": g.sum((1, 3))}


class LayerNorm(Rule):
    """Operands: weight and bias of the normalised shape; statistics (mean, rstd) come from the
    forward."""

    def __init__(
        self,
        operands: dict[str, Tensor],
        n: int,
        x: Tensor,
        layout: Layout,
        shape: list[int],
        statistics: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__(operands, n, x)
        self.layout, self.shape, self.statistics = layout, shape, statistics

    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        blocks = self.layout.blocks(self.saved.shape)
        if blocks == 1 and not grad.is_cuda and "weight" in names:
            return self._native(grad, names)
        size = math.prod(self.shape)
        g = self._positions(grad, blocks, size)
        each: dict[str, Tensor | Carried] = {}
        if "bias" in names:
            each["bias"] = g.sum(1).view(self.n, *self.shape)
        if "weight" in names:
            mean, rstd = self.statistics
            x_hat = self._positions((self.saved - mean) * rstd, blocks, size)
            each["weight"] = (g * x_hat).sum(1).view(self.n, *self.shape)
        return each

    def _positions(self, t: Tensor, blocks: int, size: int) -> Tensor:
        split = t.reshape(blocks, self.n, -1, size)
        return split.transpose(0, 1).flatten(1, 2)  # (N, T, size)

    def _native(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        """PyTorch's own backward, one sample at a time: it reads g and x once, without making
        x_hat."""
        ones = [1] * len(self.shape)
        x = self.saved.reshape(self.n, -1, *self.shape)
        g = grad.reshape(x.shape)
        mean, rstd = (s.reshape(self.n, x.shape[1], *ones) for s in self.statistics)
        weight = torch.ones(self.shape, dtype=x.dtype)
        wanted = [False, "weight" in names, "bias" in names]
        each = [
            torch.ops.aten.native_layer_norm_backward(
                g[i], x[i], self.shape, mean[i], rstd[i], weight, weight, wanted
            )
            for i in range(self.n)
        ]
        slot = {"weight": 1, "bias": 2}
        return {name: torch.stack([e[slot[name]] for e in each]) for name in names}


class Normalized(Rule):
    """Operands: weight and bias along `dims` of x; `normalize` makes x_hat again from the saved
    input."""

    def __init__(
        self,
        operands: dict[str, Tensor],
        n: int,
        x: Tensor,
        layout: Layout,
        normalize: Callable[[Tensor], Tensor],
        channels_first: bool,
    ) -> None:
        super().__init__(operands, n, x)
        self.layout, self.normalize, self.channels_first = layout, normalize, channels_first

    def per_sample(self, grad: Tensor, names: Collection[str]) -> dict[str, Tensor | Carried]:
        each: dict[str, Tensor | Carried] = {}
        if "weight" in names:
            each["weight"] = self._sum(grad * self.normalize(self.saved), self.operands["weight"])
        if "bias" in names:
            each["bias"] = self._sum(grad, self.operands["bias"])
        return each

    def _sum(self, t: Tensor, operand: Tensor) -> Tensor:
        if self.channels_first:
            t = self.layout.images(t, self.n)  # (N, R, C, ...)
            return t.reshape(*t.shape[:3], -1).sum((1, 3)).view(self.n, *operand.shape)
        t = t.reshape(self.layout.blocks(t.shape), self.n, -1, operand.numel())
        return t.sum((0, 2)).view(self.n, *operand.shape)


def meet_batch_norm(call: Call) -> Tensor:
    """`F.batch_norm` with running statistics."""
    a = call.bind(
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
    )
    x, mean, var = a["input"], a["running_mean"], a["running_var"]
    weight, bias = a["weight"], a["bias"]
    if not call.is_data(x) or a["training"] or mean is None or var is None:
        raise Unserved("batch normalisation by the statistics of the batch")
    layout = call.layout(x)
    if layout.dim != 0:
        raise Unserved(f"samples lie in dimension {layout.dim} of a channels-first tensor")
    out = F.batch_norm(x, mean, var, call.cut(weight), call.cut(bias), False, 0.0, a["eps"])
    statistics = (mean, var, call.cut(weight), a["eps"])
    operands = call.operands(weight=weight, bias=bias)
    return call.serve(out, BatchNorm(operands, call.n, x, layout, statistics))


def meet_layer_norm(call: Call) -> Tensor:
    """`F.layer_norm`."""
    a = call.bind(
        "input", "normalized_shape", "weight", "bias", "eps", weight=None, bias=None, eps=1e-5
    )
    x, shape, weight, bias = a["input"], list(a["normalized_shape"]), a["weight"], a["bias"]
    layout = _outside(call, x, shape)
    out, mean, rstd = torch.native_layer_norm(x, shape, call.cut(weight), call.cut(bias), a["eps"])
    statistics = (mean.detach(), rstd.detach())
    operands = call.operands(weight=weight, bias=bias)
    return call.serve(out, LayerNorm(operands, call.n, x, layout, shape, statistics))


def _outside(call: Call, x: Tensor, shape: Sequence[int]) -> Layout:
    """The layout of x, whose samples must lie outside the normalised dimensions."""
    if not call.is_data(x):
        raise Unserved("normalisation of a parameter")
    layout = call.layout(x)
    if layout.dim >= x.dim() - len(shape):
        raise Unserved("samples lie in the normalised dimensions")
    return layout


def meet_rms_norm(call: Call) -> Tensor:
    """`F.rms_norm`."""
    a = call.bind("input", "normalized_shape", "weight", "eps", weight=None, eps=None)
    x, shape, weight, eps = a["input"], list(a["normalized_shape"]), a["weight"], a["eps"]
    layout = _outside(call, x, shape)
    out = F.rms_norm(x, shape, call.cut(weight), eps)

    def normalize(t: Tensor) -> Tensor:
        return F.rms_norm(t, shape, None, eps)

    return call.serve(out, Normalized({"weight": weight}, call.n, x, layout, normalize, False))


def meet_group_norm(call: Call) -> Tensor:
    """`F.group_norm`."""
    a = call.bind("input", "num_groups", "weight", "bias", "eps", weight=None, bias=None, eps=1e-5)
    groups, eps = a["num_groups"], a["eps"]
    return _channels_first(call, a, lambda x, w, b: F.group_norm(x, groups, w, b, eps))


def meet_instance_norm(call: Call) -> Tensor:
    """`F.instance_norm` by the statistics of each sample."""
    a = call.bind(
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "use_input_stats",
        "momentum",
        "eps",
        running_mean=None,
        running_var=None,
        weight=None,
        bias=None,
        use_input_stats=True,
        momentum=0.1,
        eps=1e-5,
    )
    if not a["use_input_stats"] or a["running_mean"] is not None:
        raise Unserved("instance normalisation with running statistics")
    eps = a["eps"]
    return _channels_first(
        call, a, lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.0, eps)
    )


def _channels_first(
    call: Call,
    a: dict[str, Tensor],
    norm: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
) -> Tensor:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if not call.is_data(x):
        raise Unserved("normalisation of a parameter")
    layout = call.layout(x)
    if layout.dim != 0:
        raise Unserved(f"samples lie in dimension {layout.dim} of a channels-first tensor")
    out = norm(x, call.cut(weight), call.cut(bias))
    operands = call.operands(weight=weight, bias=bias)
    rule = Normalized(operands, call.n, x, layout, lambda t: norm(t, None, None), True)
    return call.serve(out, rule)


HANDLERS: Handlers = {
    F.batch_norm: meet_batch_norm,
    F.layer_norm: meet_layer_norm,
    F.rms_norm: meet_rms_norm,
    F.group_norm: meet_group_norm,
    F.instance_norm: meet_instance_norm,
}
