"""NegGrad+: descent on the retain set and ascent on the forget set at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.methods.additive import Additive
from deepclean_hooks.methods.settings import require_positive, require_shares
from deepclean_hooks.methods.term import Drawn, Term


@dataclass(frozen=True)
class NegGradPlus(Additive):
    """Minimises b loss(D_r batch) - (1 - b) loss(D_f batch): your loss on D_r counts b times, and
    its gradient with the forget batch's is clipped to a norm.

    Kurmanji, Triantafillou, Hayes, Triantafillou: "Towards Unbounded Machine Unlearning", NeurIPS
    2023, where it is a baseline: without the retain term ascent destroys the model. `retain_weight`
    (b) 0.95 and `clip` 1 are ours; their code does not clip (`clip=None`), and the term has no
    bound. The benchmarks that use the method tune b for each data set.
    """

    retain_weight: float = 0.95
    clip: float | None = 1.0
    name = "neggrad+"

    def __post_init__(self) -> None:
        """Raises ValueError unless 0 < retain_weight <= 1 and clip is positive."""
        super().__post_init__()
        require_shares(retain_weight=self.retain_weight)
        if self.clip is not None:
            require_positive(clip=self.clip)

    def term(self) -> Term:
        """Ascent on forget batches."""
        return _Opposed(self)


class _Opposed(Term):
    def __init__(self, method: NegGradPlus) -> None:
        self._method, self.seed = method, method.seed

    @property
    def of_yours(self) -> float:
        """b."""
        return self._method.retain_weight

    def losses(self, model: nn.Module, loss_fn: LossFn, drawn: Drawn) -> Tensor:
        """Minus the weighted loss of each sample."""
        each = losses.per_sample(loss_fn(model, drawn.batch), batches.size(drawn.batch))
        return -(1 - self._method.retain_weight) * each

    def adjust(self, stepped: Mapping[str, Tensor], step: int) -> None:
        """Clips the gradients' common norm."""
        if self._method.clip is not None:
            nn.utils.clip_grad_norm_(list(stepped.values()), self._method.clip)
