"""What a method is: which entries change, to what, and which may train afterwards. Pure functions
of tensors."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.fisher import PerSampleFisher
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.selecting import Mask, Selection, Weights, everything, nothing
from deepclean_hooks.methods.term import Term
from deepclean_hooks.methods.training import Training
from deepclean_hooks.ranks import fsdp, shards

__all__ = ["Mask", "Method", "Selection"]

M = TypeVar("M", bound="Method")


class Method(ABC):
    """One unlearning method; a frozen dataclass whose fields are its hyper-parameters.

    A method says what it does otherwise than plain fine-tuning on the retain set: as it stands here
    nothing is selected, no weight is written, and everything trainable trains by your loss. A
    property is overridden by a property or by a value: `name = "mine"`, `knob = "gamma"`.

    `resets_buffers`: whether buffers that `values` names become these values too, running
    statistics for instance.
    """

    name: str
    resets_buffers: ClassVar[bool] = False

    @property
    def knob(self) -> str:
        """The hyper-parameter that widens the selection when lowered, for messages; empty if
        selecting nothing or everything is normal."""
        return ""

    @property
    def effect(self) -> str:
        """What becomes of the selected entries, as a participle, for the report."""
        return "given new values"

    @property
    def own_training(self) -> bool:
        """Whether the method trains otherwise than by your loss on the retain set, to which `term`
        may add, so that only `unlearn()` can run it."""
        return False

    @property
    def sharded(self) -> bool:
        """Whether `select` and `new_values` look at each entry by itself (and count and compare
        whole tensors by way of `shards`), so that they serve a model under FSDP2."""
        return False

    @property
    def number(self) -> float:
        """The value of the `knob`; raises TypeError for a method without one."""
        if not self.knob:
            raise TypeError(f"{self.name} has no hyper-parameter that widens its selection")
        return float(getattr(self, self.knob))

    def at(self: M, number: float) -> M:
        """The same method with its `knob` at this value."""
        changed: M = dataclasses.replace(self, **{self.knob: number})  # type: ignore[type-var]  # every method is a dataclass
        return changed

    @property
    def is_open(self) -> bool:
        """Whether the `knob` is still to be chosen, by trials on copies of the model."""
        return False

    @property
    def trial_data(self) -> Data | None:
        """Data that those trials compare the forget set with, neither training nor test data."""
        return None

    @property
    def measured_by(self) -> Estimator:
        """How both sets are measured: the exact Fisher diagonal, unless a method says otherwise."""
        return PerSampleFisher()

    @property
    def retain_measured_by(self) -> Estimator:
        """How the retain set is measured, where not as the forget set is."""
        return self.measured_by

    @property
    def joint(self) -> bool:
        """Whether `select` is given, as `retain`, a measurement of D_r and D_f in a single walk."""
        return False

    def may_select(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether entries of this trainable parameter may be picked; only these are measured. All
        of them by default."""
        return True

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        """W_f from the two measurements, both of the same parameters; changes nothing. No entry by
        default."""
        return Selection(nothing(forget), 0, "nothing is selected")

    def new_values(
        self, weights: Weights, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """What the picked entries become: full-shape tensors, read only where the mask is True. The
        weights as they are by default."""
        return {name: weights[name] for name in selection.masks}

    def values(
        self, model: nn.Module, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        """`new_values` of the model's weights; for a method that needs the model's modules. The
        model is left as it is."""
        weights = {name: p.detach() for name, p in model.named_parameters()}
        return self.new_values(weights, selection, forget, retain)

    def write(self, model: nn.Module, selection: Selection, values: Mapping[str, Tensor]) -> None:
        """Gives the picked entries of an unwrapped model, and its buffers where the method resets
        them, their values, in place; every other bit stays."""
        weights = fsdp.parameters_of(model)
        with torch.no_grad():
            for name, mask in selection.masks.items():
                # where copies bits, so the entries that stay keep theirs, NaN and -0.0 too
                here, new = shards.local(weights[name]), shards.local(values[name])
                here.copy_(torch.where(shards.local(mask), new, here))
            if self.resets_buffers:
                for name, buffer in model.named_buffers():
                    buffer.copy_(values.get(name, buffer))

    def free(self, selection: Selection) -> Mask:
        """The entries that may train afterwards; every other entry keeps its bits. Every entry that
        was measured by default."""
        return everything(selection.masks)

    def term(self) -> Term | None:
        """What is added to the objective of the loop that trains, one for each run; nothing by
        default."""
        return None

    def training(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> Training:
        """How `unlearn()` trains where `own_training` is set; may keep copies of the model."""
        raise NotImplementedError(f"{self.name} trains by the loss of your loop")

    def scheduled(self, *, epochs: int, steps_per_epoch: int) -> Method:
        """The method for a training of this length; most methods do not depend on it."""
        return self

    def require_plain_training(self) -> None:
        """Raises ValueError for a method that a loop of your own cannot train."""
        if self.own_training:
            raise ValueError(
                f"{self.name} trains with an objective of its own, which no other loop has; use "
                f"unlearn(model, forget, retain, method={type(self).__name__}(...))"
            )

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters by name, for the report; callables appear by their name, and data
        (a field with compare=False) not at all."""
        fields: tuple[dataclasses.Field[Any], ...] = ()
        if dataclasses.is_dataclass(self):
            fields = dataclasses.fields(self)
        values = {f.name: getattr(self, f.name) for f in fields if f.init and f.compare}
        return {
            k: repr(v) if isinstance(v, Estimator | Method) else getattr(v, "__qualname__", v)
            for k, v in values.items()
        }
