"""Methods that add a term to the loop's own loss on D_r."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor, nn

from deepclean_hooks.measure.estimator import Estimator, SamplesOnly
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.methods.selecting import Mask, Selection


@dataclass(frozen=True)
class Additive(Method):
    """A method that says what is optimised, by a term; what may train and what is written are its
    options.

    `train`: a method whose selection alone may train, such as DeepClean(gamma=1.1); everything
    trainable by default. `reset`: whether the selected entries also get that method's new values
    first, 0 for DeepClean; by default every weight stays as it is. `seed`: of the order in which
    forget batches are drawn.
    """

    _: KW_ONLY
    train: Method | None = None
    reset: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for a `train` that selects nothing, and for `reset`
        without it."""
        if self.train is not None and not isinstance(self.train, Method):
            raise TypeError(
                "train must be a method that selects, such as DeepClean(gamma=1.1), got "
                f"{self.train!r}"
            )
        if isinstance(self.train, Additive) or getattr(self.train, "own_training", False):
            raise ValueError(
                f"train={type(self.train).__name__}(...) has an objective of its own; pass a "
                "method that selects, such as DeepClean(gamma=1.1)"
            )
        if self.reset and self.train is None:
            raise ValueError(
                "reset=True writes what `train` selects, and there is no `train`; pass "
                "train=DeepClean(gamma=1.1), for instance"
            )

    # Each of these is the answer of `train`, if there is one.

    @property
    def measured_by(self) -> Estimator:
        """What `train` measures, or nothing."""
        return SamplesOnly() if self.train is None else self.train.measured_by

    @property
    def retain_measured_by(self) -> Estimator:
        """What `train` measures, or nothing."""
        return SamplesOnly() if self.train is None else self.train.retain_measured_by

    @property
    def joint(self) -> bool:
        """As `train`."""
        return self.train is not None and self.train.joint

    @property
    def sharded(self) -> bool:
        """As `train`."""
        return self.train is not None and self.train.sharded

    @property
    def knob(self) -> str:
        """As `train`."""
        return "" if self.train is None else self.train.knob

    @property
    def effect(self) -> str:
        """What becomes of the selected entries."""
        if self.train is not None and self.reset:
            return self.train.effect
        return "left as they were, to be trained"

    def may_select(self, name: str, parameter: nn.Parameter) -> bool:
        """As `train`."""
        return self.train is None or self.train.may_select(name, parameter)

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """What `train` selects."""
        if self.train is None:
            return super().select(forget, retain)
        return self.train.select(forget, retain)

    def values(
        self, model: nn.Module, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """The values that `train` gives, or the weights as they are."""
        if self.train is not None and self.reset:
            return self.train.values(model, selection, forget, retain)
        return super().values(model, selection, forget, retain)

    def free(self, selection: Selection) -> Mask:
        """What `train` selects, or everything."""
        return super().free(selection) if self.train is None else selection.masks
