"""Class forgetting by projection: what only the forgotten classes put into a layer is taken out of
its weights. No gradients, no training.

Kodge, Saha, Roy: "Deep Unlearning: Fast and Efficient Gradient-free Class Forgetting", TMLR 2024.
D: inputs of one output of a layer, G: groups, O: outputs of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from deepclean_hooks.measure import classes
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.layer_inputs import LayerInputs
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Mask, Selection, Weights
from deepclean_hooks.methods.settings import require_positive

RETAIN_GRID = (10.0, 30.0, 100.0, 300.0, 1000.0)
FORGET_GRID = (1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class ClassProjection(Method):
    """W becomes W P^T with P = I - (M_f - M_f M_r), in every linear layer and convolution.

    M = U diag(lambda) U^T over the left singular vectors of a layer's inputs, with the importance
    lambda = alpha s / ((alpha - 1) s + 1) of a direction that holds the share s of their energy
    (equations 3 to 5), once for the retain set with `alpha_retain`, once for the forget set with
    `alpha_forget`. All layers are measured on the original network. Biases and norms stay as they
    are. 100 and 3 are the paper's for CIFAR-10 (CIFAR-100: 1000 and 30, ImageNet: 100 and 10);
    `tuning.search` looks for better values on training data, among `ClassProjection().grid()`.

    `estimator`: over every patch of every sample, exactly; `LayerInputs(patches=SampledPatches())`
    samples patches as the published code does. Pass Subsets of some hundred samples of each class
    to measure as little as it did (900 on CIFAR-10). Several classes are forgotten at once by their
    joint inputs. A forget set that shares classes with the retain set is refused.
    """

    alpha_retain: float = 100.0
    alpha_forget: float = 3.0
    estimator: LayerInputs = field(default_factory=LayerInputs)
    name = "class projection"
    effect = "projected"

    def __post_init__(self) -> None:
        """Raises ValueError for a hyper-parameter that is no positive number."""
        require_positive(alpha_retain=self.alpha_retain, alpha_forget=self.alpha_forget)

    def grid(
        self,
        alphas_retain: Sequence[float] = RETAIN_GRID,
        alphas_forget: Sequence[float] = FORGET_GRID,
    ) -> list[ClassProjection]:
        """The same with every pair of alphas, by default of the paper's grid."""
        pairs = itertools.product(alphas_retain, alphas_forget)
        return [replace(self, alpha_retain=kept, alpha_forget=gone) for kept, gone in pairs]

    @property
    def measured_by(self) -> Estimator:
        """Gram matrices of the layers' inputs."""
        return self.estimator

    def may_select(self, name: str, parameter: nn.Parameter) -> bool:
        """Weights of layers, which are matrices at least."""
        return parameter.dim() >= 2

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """Every weight whose inputs were seen; raises ValueError for sets that share classes."""
        _require_classes(forget, retain)
        shapes, masks = forget.settings["shapes"], Mask()
        for key, gram in forget.sums.items():
            name, rows = _rows(key)
            if name not in masks:
                masks[name] = torch.zeros(shapes[name], dtype=torch.bool, device=gram.device)
            masks[name][rows] = True
        return Selection(masks, 0, "the inputs of the weight's layer were seen")

    def new_values(
        self, weights: Weights, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """W P^T, computed in float64."""
        values = {name: weights[name].clone() for name in selection.masks}
        for key, gram in forget.sums.items():
            name, rows = _rows(key)
            kept = retain.sums.get(key, torch.zeros_like(gram))  # a branch only the forget set took
            projection = self.projection(gram, kept)  # (G, D, D)
            part = values[name][rows]
            grouped = part.double().reshape(len(projection), -1, projection.shape[-1])  # (G, O, D)
            part.copy_((grouped @ projection.mT).reshape(part.shape))
        return values

    def projection(self, forget: Tensor, retain: Tensor) -> Tensor:
        """P (G, D, D) from the two Gram matrices, in float64."""
        kept, gone = scaled(retain, self.alpha_retain), scaled(forget, self.alpha_forget)
        identity = torch.eye(kept.shape[-1], dtype=kept.dtype, device=kept.device)
        projection: Tensor = identity - (gone - gone @ kept)
        return projection

    def free(self, selection: Selection) -> Mask:
        """Nothing."""
        return {}


def scaled(gram: Tensor, alpha: float) -> Tensor:
    """M = U diag(lambda) U^T (G, D, D) of Gram matrices: their directions, scaled by importance."""
    energy, directions = torch.linalg.eigh(gram.double())  # (G, D), (G, D, D); energy: sigma^2
    energy = energy.clamp_min(0)
    total = energy.sum(-1, keepdim=True)
    share = torch.where(total > 0, energy / total, torch.zeros_like(energy))
    importance = alpha * share / ((alpha - 1) * share + 1)
    matrix: Tensor = (directions * importance[..., None, :]) @ directions.mT
    return matrix


def _rows(key: str) -> tuple[str, slice]:
    """The weight and its rows that a name of `InputGrams` means."""
    if not key.endswith("]"):
        return key, slice(None)
    name, _, rows = key[:-1].rpartition("[")
    first, last = rows.split(":")
    return name, slice(int(first), int(last))


def _require_classes(forget: Measurement, retain: Measurement) -> None:
    mine: classes.Counts = forget.settings.get("classes") or {}
    both = classes.shared(forget.settings.get("classes"), retain.settings.get("classes"))
    if both is None:
        raise ValueError(
            "ClassProjection forgets whole classes and found no class labels in the batches; yield "
            "(x, y) or a mapping with 'labels', or use DeepClean or SSD"
        )
    if both:
        raise ValueError(
            f"ClassProjection forgets whole classes, but {len(both)} of the forget set's "
            f"{len(mine)} classes are in the retain set too, for instance {', '.join(both[:3])}; "
            "for a subset of samples use DeepClean(gamma=1.1) or SSD()"
        )
