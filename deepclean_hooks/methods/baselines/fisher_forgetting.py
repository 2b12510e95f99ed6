"""Fisher forgetting: noise on every weight, the more the less the retain set needs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepclean_hooks.measure.estimator import Estimator, SamplesOnly
from deepclean_hooks.measure.expected_fisher import ExpectedFisher
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Mask, Selection, Weights, everything
from deepclean_hooks.methods.settings import require_positive

LARGEST, LARGEST_IN_HEAD = 1e3, 1e2  # of 1 / F, as in the published code
MORE = 10.0  # for the last layer and one-dimensional tensors
FORGOTTEN_ROW = 1e-4  # the published variance of the forgotten class's row, before that factor
EPSILON = 1e-8  # the published code's, kept because its alpha goes with it


@dataclass(frozen=True)
class FisherForgetting(Method):
    """theta ~ N(theta, alpha / F), F the expected Fisher diagonal on D_r; nothing is trained.

    Golatkar, Achille, Soatto: "Eternal Sunshine of the Spotless Net", CVPR 2020, with what their
    code adds: 1 / (F + 1e-8) is at most 1e3 (1e2 in tensors whose first axis is the classes) and
    averaged over the second axis; ten times it for these and for one-dimensional tensors. `alpha`
    1e-6 is their notebook's (8 sweeps from 1e-8 to 1e-5): it has to be tuned, DeepClean's table
    shows chance accuracy without. `forgotten_class`: its row of the head becomes noise around 0,
    variance 1e-3, as their code does for a class (1e-4, and then the factor of the last layer).
    F is exact: every class of every sample, weighted by p(y | x), C backward passes.
    """

    classes: int
    alpha: float = 1e-6
    forgotten_class: int | None = None
    seed: int = 0
    name = "fisher forgetting"
    effect = "given noise"
    measured_by = SamplesOnly()

    def __post_init__(self) -> None:
        """Raises ValueError for a bad alpha, number of classes or class."""
        require_positive(alpha=self.alpha, classes=self.classes)
        if self.forgotten_class is not None and not 0 <= self.forgotten_class < self.classes:
            raise ValueError(
                f"forgotten_class must be 0 to {self.classes - 1}, got {self.forgotten_class!r}"
            )

    @property
    def retain_measured_by(self) -> Estimator:
        """The Fisher diagonal with labels as the model expects them."""
        return ExpectedFisher(self.classes)

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """Every entry."""
        return Selection.of_all(everything(retain.sums), "every entry gets noise")

    def new_values(
        self, weights: Weights, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """Samples around the weights, drawn by the seed."""
        random = torch.Generator().manual_seed(self.seed)
        values = {}
        for name, fisher in retain.mean().items():
            mean, variance = weights[name].clone(), self.variance(fisher)
            if self.forgotten_class is not None and self._is_head(fisher):
                mean[self.forgotten_class] = 0
                variance[self.forgotten_class] = FORGOTTEN_ROW * MORE
            noise = torch.randn(mean.shape, generator=random).to(mean)
            values[name] = mean + variance.sqrt().to(mean) * noise
        return values

    def variance(self, fisher: Tensor) -> Tensor:
        """alpha / F with the published bounds, averages and factors."""
        head = self._is_head(fisher)
        variance = (1 / (fisher + EPSILON)).clamp_max(LARGEST_IN_HEAD if head else LARGEST)
        variance = variance * self.alpha
        if variance.dim() > 1:
            variance = variance.mean(1, keepdim=True).expand_as(variance).clone()
        return variance * MORE if head or fisher.dim() == 1 else variance

    def _is_head(self, fisher: Tensor) -> bool:
        return fisher.dim() > 0 and fisher.shape[0] == self.classes

    def free(self, selection: Selection) -> Mask:
        """Nothing."""
        return {}
