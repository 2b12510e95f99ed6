"""What a method adds to the objective of the loop that trains: a term on the forget set, or on the
weights.

N: this rank's samples of a forget batch, B: those of all ranks together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.methods.selecting import Selection


@dataclass(frozen=True)
class Original:
    """What a term can be prepared from: the run as it is before any weight changes.

    `forget_count` and `retain_count`: |D_f| and |D_r|; `seen`: the fingerprints of the samples of
    both, (|D_f| + |D_r|,) int64.
    """

    model: nn.Module
    forget: Samples
    selection: Selection
    forget_count: int
    retain_count: int
    seen: Tensor
    progress: bool


@dataclass(frozen=True)
class Drawn:
    """A forget batch: this rank's samples, and where they stand.

    `whole`: the positions in D_f of the samples of all ranks together, (B,); `mine`: which of these
    are this rank's, (N,); `step`: how many batches were drawn before.
    """

    batch: Batch
    whole: Tensor
    mine: Tensor
    step: int


class Term:
    """Added to the loop's own objective at each step of an optimizer; one for each run.

    `seed`: of the order of forget batches. `draws`: whether it needs forget batches. `evaluates`:
    whether they run through the model in eval mode, as the model answers when it is used, which
    leaves running statistics alone; else in the mode that the loop has set, as the published loops
    do.
    """

    seed: int = 0
    draws: ClassVar[bool] = True
    evaluates: ClassVar[bool] = False

    @property
    def of_yours(self) -> float:
        """What the loop's own gradient is multiplied by: 1 by default."""
        return 1.0

    def prepare(self, original: Original) -> None:
        """Computes what the term needs of the original model and the data; nothing by default."""

    def losses(self, model: nn.Module, loss_fn: LossFn, drawn: Drawn) -> Tensor:
        """What is minimised for each sample of the batch, (N,); its mean over B is the term."""
        raise NotImplementedError(f"{type(self).__name__} draws forget batches and has no losses")

    def adjust(self, stepped: Mapping[str, Tensor], step: int) -> None:
        """Changes the gradients of the tensors that are about to be stepped, after the forget
        batch's was added; not at all by default."""

    def state_dict(self) -> dict[str, Tensor]:
        """What `prepare` computed, for a run that goes on from a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what another run's `prepare` computed."""
