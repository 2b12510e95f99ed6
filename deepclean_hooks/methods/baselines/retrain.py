"""Retraining from scratch on the retain set: the gold standard for the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepclean_hooks.measure.estimator import Estimator, SamplesOnly
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.baselines.fine_tune import everything
from deepclean_hooks.methods.method import Mask, Method, Selection
from deepclean_hooks.model import no_trace


@dataclass(frozen=True)
class Retrain(Method):
    """Every trainable parameter and every running statistic gets a new initial value; all train.

    `build` makes an untrained network of the same architecture, drawn by `seed`. Without it every
    module's own `reset_parameters` is called, at any depth (the code of SSD reaches top-level
    children only, in practice the last layer), and a parameter that no module resets is an error.
    Train as the original was: DeepClean's CIFAR-10 networks by SGD 0.1, momentum 0.9, weight decay
    5e-4, 20 epochs, divided by 5 after 6, 12 and 16, with augmentation; 182 epochs at batches of
    256, divided by 10 after 91 and 136, in the tables of Jia et al. and Fan et al.
    """

    build: Callable[[], nn.Module] | None = None
    seed: int = 0
    name = "retrain"
    effect = "drawn anew"
    resets_buffers = True

    @property
    def measured_by(self) -> Estimator:
        """Nothing is measured."""
        return SamplesOnly()

    def may_select(self, name: str, parameter: nn.Parameter) -> bool:
        """All of them."""
        return True

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """Every entry."""
        masks = everything(forget.sums)
        total = sum(mask.numel() for mask in masks.values())
        return Selection(masks, total, "every trainable entry is")

    def new_values(
        self,
        weights: Mapping[str, Tensor],
        selection: Selection,
        forget: Measurement,
        retain: Measurement,
    ) -> dict[str, Tensor]:
        """Not used: initial values are the modules' to give, see `values`."""
        raise NotImplementedError("Retrain needs the model: call values()")

    def values(
        self, model: nn.Module, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """The parameters and the buffers of an untrained network."""
        anew = fresh(model, seed=self.seed, build=self.build)
        tensors = {**dict(anew.named_parameters()), **dict(anew.named_buffers())}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def free(self, selection: Selection) -> Mask:
        """Everything trainable."""
        return selection.masks


def fresh(
    model: nn.Module, *, seed: int, build: Callable[[], nn.Module] | None = None
) -> nn.Module:
    """An untrained network of the same architecture on the same device; the model and the random
    state stay as they are.

    Raises ValueError, naming all of them, for parameters that no `reset_parameters` resets, and for
    a built network with other parameters.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        if build is not None:
            anew = build()
        else:
            anew = copy.deepcopy(model)
            _require_all_reset(anew)
            for module in anew.modules():
                reset = _own_reset(module)
                if reset is not None:
                    reset()
    found = {name: p.shape for name, p in anew.named_parameters()}
    wanted = {name: p.shape for name, p in model.named_parameters()}
    differ = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
    if differ:
        raise ValueError(
            f"build makes a network with other parameters, for instance {differ[:3]}; it must make "
            "the model's own architecture"
        )
    return anew.to(no_trace.device_of(model))


def _own_reset(module: nn.Module) -> Callable[[], None] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # nn.MultiheadAttention has the second
        reset = getattr(module, name, None)
        if callable(reset):
            return reset  # type: ignore[no-any-return]  # by convention without arguments
    return None


def _require_all_reset(model: nn.Module) -> None:
    left = []
    for prefix, module in model.named_modules():
        if _own_reset(module) is None:
            own = module.named_parameters(prefix, recurse=False)
            left += [name for name, _ in own]
    if left:
        raise ValueError(
            f"no reset_parameters() resets {', '.join(left)}; pass Retrain(build=...), a function "
            "that makes an untrained network"
        )
