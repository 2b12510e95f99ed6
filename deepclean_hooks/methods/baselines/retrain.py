"""Retraining from scratch on the retain set: the gold standard for every other method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Selection, everything
from deepclean_hooks.methods.teachers import fresh


@dataclass(frozen=True)
class Retrain(Method):
    """Every trainable parameter and every running statistic gets a new initial value; all train.

    `build` makes an untrained network of the same architecture, drawn by `seed`. Without it the
    `reset_parameters` of every module is called, at any depth (the code of SSD reaches top-level
    children only, in practice the last layer), and a parameter that no module resets is an error.
    Train as the original was: DeepClean's CIFAR-10 networks by SGD 0.1, momentum 0.9, weight decay
    5e-4, 20 epochs, divided by 5 after 6, 12 and 16, with augmentation; 182 epochs at batches of
    256, divided by 10 after 91 and 136, in the tables of Jia et al. and Fan et al.
    """

    build: Callable[[], nn.Module] | None = None
    seed: int = 0
    name = "retrain"
    effect = "drawn anew"
    measured_by = SamplesOnly()
    resets_buffers = True

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """Every entry."""
        return Selection.of_all(everything(forget.sums), "every trainable entry is")

    def values(
        self, model: nn.Module, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """The parameters and the buffers of an untrained network."""
        anew = fresh(model, seed=self.seed, build=self.build)
        tensors = {**dict(anew.named_parameters()), **dict(anew.named_buffers())}
        return {name: tensor.detach() for name, tensor in tensors.items()}
