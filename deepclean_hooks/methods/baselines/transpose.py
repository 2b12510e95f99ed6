"""CT: every convolution kernel is transposed, and all weights are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deepclean_hooks.measure.estimator import SamplesOnly
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Selection, Weights, everything, nothing


@dataclass(frozen=True)
class CT(Method):
    """The two spatial axes of every square kernel (4-D weights) change places; then D_r is trained.

    "Convolution transpose", an entry of the NeurIPS 2023 unlearning challenge, in Cadet et al.,
    "Deep Unlearn", 2024. A model without such kernels is refused.
    """

    name = "ct"
    effect = "transposed"
    measured_by = SamplesOnly()

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """All kernels; raises ValueError if there are none."""
        kernels = {n: t for n, t in forget.sums.items() if _square(t)}
        if not kernels:
            raise ValueError(
                "CT transposes square convolution kernels, and this model has none larger than "
                "1 x 1; use another method, FineTune() for instance"
            )
        masks = {**nothing(forget), **everything(kernels)}
        total = sum(t.numel() for t in kernels.values())
        return Selection(masks, total, "the entry is one of a square kernel's")

    def new_values(
        self, weights: Weights, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """The kernels, transposed."""
        kept = super().new_values(weights, selection, forget, retain)
        return {name: w.transpose(2, 3) if _square(w) else w for name, w in kept.items()}


def _square(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.shape[2] == weight.shape[3] > 1
