"""Gram matrices of the inputs of linear layers and convolutions, over every sample and patch.

N: samples, P: positions (tokens, or places where a kernel is applied), G: groups, D: inputs of one
output (channels of a group x kernel). The inputs A (D, N P) of a layer are never stored: their left
singular vectors are the eigenvectors of A A^T (D, D), which is a sum over positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepclean_hooks import ranks
from deepclean_hooks.data.walk import walk
from deepclean_hooks.measure import classes
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.measure.request import Request, all_samples
from deepclean_hooks.model import no_trace, switches
from deepclean_hooks.persample import windows

# The body of a composite function, whose inner calls are seen: attention's projections are inside.
from deepclean_hooks.persample.intercept import COMPOSITES

_CONVOLUTIONS: dict[Callable[..., Any], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class InputGrams(Measurement):
    """Sums of a a^T over the inputs a of each layer, (G, D, D), by the name of its weight.

    Where only rows of a weight meet an input (attention with other keys than queries) the name is
    `weight[first:last]`. `settings["classes"]` counts the samples of each label, None without
    labels; `settings["shapes"]` has the shapes of the weights.
    """

    noun = "set of Gram matrices"
    file_format = "deepclean-hooks input grams"

    def _settings_with(self, other: Measurement, sign: int) -> dict[str, Any]:
        both = classes.combined(self.settings["classes"], other.settings["classes"], sign)
        return {**self.settings, "classes": both}


@contextlib.contextmanager
def _without_fused_attention() -> Iterator[None]:
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


# Attention's fused path would hide its projections.
_plain_attention = switches.Switch(_without_fused_attention)


@dataclass(frozen=True)
class SampledPatches:
    """The published code's sampling, for comparison: it changes with the batch size and the seed.

    Images wider than 3 kernels are cut to one random crop of 3 x 3 kernels a batch, which is padded
    as the image was, so that its borders get zeros that are not in the data; at most `most` patches
    of a batch are kept. torch's generator with `seed`, where the published code uses numpy's.
    """

    most: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class LayerInputs(Estimator):
    """Gram matrices of the inputs of every linear layer and convolution, in eval mode.

    Sees F.linear and F.conv1d to F.conv3d on weights of the model, however the module calls them:
    groups, dilation, stride, padding modes, both projections of nn.MultiheadAttention, fused
    projections. Transposed convolutions, embeddings and weights derived from parameters are not
    seen. The products of a batch are computed in the model's precision, or in float64 with
    `computed=torch.float64`, and added up in `accumulate`.
    """

    accumulate: torch.dtype = torch.float64
    computed: torch.dtype | None = None
    patches: SampledPatches | None = None
    result = InputGrams

    def __call__(self, request: Request) -> InputGrams:
        """One forward pass of the set; raises ValueError for sampled patches on several ranks."""
        no_trace.require_precision(request.inner, self.accumulate)
        if self.patches is not None and ranks.world()[1] > 1:
            raise ValueError(
                f"{self.patches!r} draws patches batch by batch, so {ranks.world()[1]} ranks would "
                "give another result than one; launch one process, or take LayerInputs() without "
                "patches="
            )
        weights = request.weights
        settings = self.described(request, shapes={n: list(p.shape) for n, p in weights.items()})
        labels = classes.Counted()
        ids: list[int] = []
        with no_trace.no_trace(request.model) as inner, no_trace.float32_weights(inner) as dtype:
            grams = Grams(weights, self)
            device = no_trace.device_of(inner)
            label = request.label("layer inputs")
            walked = walk(request.data, device=device, dtype=dtype, progress=label, ids=ids)
            with torch.no_grad(), ranks.fail_together(), _plain_attention():
                for batch in walked:
                    labels.add(batch)
                    with grams:
                        request.loss_fn(inner, batch)
        _complete(grams.sums, self.accumulate, device)
        return _over_ranks(grams.sums, ids, labels, settings)


def _complete(sums: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Adds zeros for what only other ranks met: a rank without samples met nothing."""
    shapes: dict[str, tuple[int, ...]] = {}
    for known in ranks.gather({name: tuple(gram.shape) for name, gram in sums.items()}):
        shapes.update(known)
    for name in shapes.keys() - sums.keys():
        sums[name] = torch.zeros(shapes[name], dtype=dtype, device=device)


def _over_ranks(
    sums: dict[str, Tensor], ids: list[int], labels: classes.Counted, settings: dict[str, Any]
) -> InputGrams:
    ranks.sum_over_ranks(sums)
    samples = all_samples(ids)
    counts = {"classes": labels.over_ranks()}
    return InputGrams(sums, len(samples), samples, {**settings, **counts})


class Grams(TorchFunctionMode):
    """Adds up the Gram matrix of every input that meets one of `weights` while it is active."""

    def __init__(self, weights: Mapping[str, nn.Parameter], how: LayerInputs) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self._weights, self._how = weights, how
        self._names = {id(p): name for name, p in weights.items()}
        seed = 0 if how.patches is None else how.patches.seed
        self._random = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one torch function; looks at its input if it is a layer's."""
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        if func is F.linear:
            self._linear(*args, **kwargs)
        elif func in _CONVOLUTIONS:
            self._convolution(_CONVOLUTIONS[func], *args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        name = self._name(weight)
        if name is not None:
            rows = input.reshape(-1, input.shape[-1])  # (N P, D)
            self._add(name, self._some(rows)[None])

    def _convolution(
        self,
        spatial: int,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        name = self._name(weight)
        if name is None:
            return
        x = input if input.dim() == spatial + 2 else input[None]  # (N, C, *S)
        kernel = weight.shape[2:]
        steps, gaps = windows.each(stride, spatial), windows.each(dilation, spatial)
        if self._how.patches is not None:
            x = self._cropped(x, 3 * max(kernel))
        x = windows.padded(x, windows.sides(padding, kernel, gaps))
        seen = windows.windows(x, kernel, steps, gaps)  # (N, *places, C, *kernel)
        rows = self._some(seen.flatten(0, spatial).flatten(2))  # (L, C, K)
        grouped = rows.reshape(len(rows), groups, -1)  # (L, G, D)
        self._add(name, grouped.transpose(0, 1))

    def _name(self, weight: Tensor) -> str | None:
        """The name of a weight, or of the rows of one; None for any other tensor."""
        if id(weight) in self._names:
            return self._names[id(weight)]
        for name, whole in self._weights.items():
            # Attention cuts its projection into views, which share their memory with it.
            if whole.dim() != 2 or weight.shape[1:] != whole.shape[1:] or not len(weight):
                continue
            if weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                if weight.stride() != whole.stride():
                    return None
                first = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
                return f"{name}[{first}:{first + len(weight)}]"
        return None

    def _add(self, name: str, rows: Tensor) -> None:
        """Adds the Gram matrices of rows (G, L, D)."""
        rows = rows.detach().to(self._how.computed or rows.dtype)
        gram = rows.transpose(1, 2) @ rows  # (G, D, D)
        if not torch.isfinite(gram.sum()):
            raise ValueError(f"an input of {name} is NaN or infinite; check inputs and weights")
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(gram, dtype=self._how.accumulate)
        self.sums[name] += gram

    def _cropped(self, x: Tensor, size: int) -> Tensor:
        for dim in range(2, x.dim()):
            if x.shape[dim] > size:
                start = int(torch.randint(x.shape[dim] - size + 1, (), generator=self._random))
                x = x.narrow(dim, start, size)
        return x

    def _some(self, rows: Tensor) -> Tensor:
        """At most the sampled number of rows (L, ...)."""
        if self._how.patches is None or len(rows) <= self._how.patches.most:
            return rows
        chosen = torch.randperm(len(rows), generator=self._random)[: self._how.patches.most]
        return rows[chosen.to(rows.device)]
