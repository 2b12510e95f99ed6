"""Other ways to the same diagonal, each as its own documentation says: timed, and compared with a
one-sample loop.

Run by `python -m benchmarks.fisher --peers`. Every library is imported when its turn comes, so
those that are not installed are rows with a reason:

    pip install opacus backpack-for-pytorch nngeometry asdfghjkl
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclean_hooks.data.losses import cross_entropy
from deepclean_hooks.persample.loop import squared_gradients

Batch = tuple[Tensor, Tensor]
Diagonal = dict[str, Tensor]
"""Parameter name -> sum of squared per-sample gradients of the cross-entropy."""

Way = Callable[[nn.Module, Batch], Diagonal]


def one_sample_loop(model: nn.Module, batch: Batch) -> Diagonal:
    return squared_gradients(model, dict(model.named_parameters()), cross_entropy, batch)


def functional(model: nn.Module, batch: Batch) -> Diagonal:
    """torch.func: vmap of grad, which holds every sample's gradient at once."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(weights: Diagonal, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (weights, buffers), (x[None],))
        return F.cross_entropy(logits, y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *batch)
    return {name: gradients.square().sum(0) for name, gradients in each.items()}


def opacus(model: nn.Module, batch: Batch) -> Diagonal:
    """GradSampleModule leaves every sample's gradient in `grad_sample`."""
    from opacus import GradSampleModule

    # Not strict: it refuses BatchNorm, which in eval mode mixes no samples.
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    # Its hooks work in train mode only; what has no parameters (dropout) stays in eval mode.
    wrapped.train()
    for module in model.modules():
        module.train(any(True for _ in module.parameters(recurse=False)))
    try:
        F.cross_entropy(wrapped(batch[0]), batch[1], reduction="sum").backward()
        named = dict(model.named_parameters())
        return {n: p.grad_sample.square().sum(0) for n, p in named.items()}  # type: ignore[attr-defined]
    finally:
        wrapped._close()


def backpack(model: nn.Module, batch: Batch) -> Diagonal:
    """SumGradSquared; the model must be made of modules that it extends."""
    from backpack import backpack as extended
    from backpack import extend
    from backpack.extensions import SumGradSquared

    extend(model, use_converter=not isinstance(model, nn.Sequential))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    with extended(SumGradSquared()):
        loss(model(batch[0]), batch[1]).backward()
    return {n: p.sum_grad_squared for n, p in model.named_parameters()}  # type: ignore[attr-defined]


def nngeometry(model: nn.Module, batch: Batch) -> Diagonal:
    """PMatDiag of the Jacobian of log p(y | x), which is the mean over the samples."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    def log_likelihood(x: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(model(x), y, reduction="none")[:, None]

    layers = LayerCollection.from_model(model)
    generator = TorchHooksJacobianBackend(
        model=model, function=log_likelihood, layer_collection=layers
    )
    data = DataLoader(TensorDataset(*batch), batch_size=len(batch[0]))
    flat = PMatDiag(generator=generator, examples=data).get_diag() * len(batch[0])
    found: Diagonal = {}
    for module_name in layers.layers:
        at = layers.p_pos[module_name]
        for name, p in model.get_submodule(module_name).named_parameters(recurse=False):
            found[f"{module_name}.{name}"] = flat[at : at + p.numel()].view(p.shape)
            at += p.numel()
    return found


def asdl(model: nn.Module, batch: Batch) -> Diagonal:
    """The empirical Fisher maker with diagonal shape; data_size=1, so that it is a sum.

    Where a convolution's kernel outweighs its maps (operations/conv.py of 0.1a5) it multiplies
    squares position by position, sum over t of g_t^2 x_t^2, which is no squared sample gradient.
    """
    from asdl import FISHER_EMP, SHAPE_DIAG, FisherConfig, get_fisher_maker

    config = FisherConfig(FISHER_EMP, [SHAPE_DIAG], loss_type="cross_entropy", data_size=1)
    maker = get_fisher_maker(model, config)
    logits = maker.setup_model_call(model, batch[0])
    maker.setup_loss_call(nn.CrossEntropyLoss(reduction="sum"), logits, batch[1])
    maker.forward_and_backward()
    found: Diagonal = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            value = maker.get_fisher_tensor(module, SHAPE_DIAG, name)
            if value is not None:
                found[f"{module_name}.{name}" if module_name else name] = value
    return found


WAYS: dict[str, Way] = {
    "one-sample loop": one_sample_loop,
    "torch.func": functional,
    "opacus": opacus,
    "backpack": backpack,
    "nngeometry": nngeometry,
    "asdl": asdl,
}


def without_inplace(model: nn.Module) -> nn.Module:
    """A copy whose activations are out of place, which hooks of several of the libraries need."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return copied


def compared(model: nn.Module, batch: Batch, seconds: Callable[[Callable[[], Any]], float]) -> Any:
    """A row for each way: its seconds for the batch, or why there are none; its error in float64.

    The error is the largest difference from the one-sample loop in float64, on four samples, over
    the tensor's largest entry, and `missing` counts parameters that the way says nothing of.
    """
    few = (batch[0][:4].double(), batch[1][:4])
    truth = one_sample_loop(copy.deepcopy(model).double(), few)
    rows = {}
    for name, way in WAYS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = way(without_inplace(model).double(), few)
                rows[name] = {**agreement(found, truth), "seconds": None}
                own = without_inplace(model)
                rows[name]["seconds"] = seconds(lambda way=way, own=own: way(own, batch))
        except Exception as reason:
            text = str(reason).strip().splitlines()
            told = f"{type(reason).__name__}: {text[0][:160] if text else ''}"
            rows[name] = {**rows.get(name, {}), "seconds": None, "does_not_run": told}
        print(f"    {name}: {rows[name]}", file=sys.stderr, flush=True)
    return rows


def agreement(found: Diagonal, truth: Diagonal) -> dict[str, Any]:
    """The largest relative error over the parameters that were found, and how many were not."""
    largest = max(float(t.max()) for t in truth.values())
    worst = 0.0
    for name, expected in truth.items():
        # A parameter without any gradient but rounding (attention key biases) has no scale.
        scale = float(expected.max())
        if name in found and scale > 1e-20 * largest:
            worst = max(worst, float((found[name].double() - expected).abs().max()) / scale)
    return {"error": worst, "missing": len(truth.keys() - found.keys())}
