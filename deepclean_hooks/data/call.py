"""How a batch is given to a model: which part is the input, which the labels, by what names.

N: samples of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepclean_hooks.data.batches import LABEL_NAMES, Batch, SampleList, label_key

SCORED = "F is torch.nn.functional; such a run is measured, and cannot be scored"


@dataclass(frozen=True)
class Call:
    """What the model is called with, the labels, and both as a user would write them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    code: str
    labels_code: str

    def loss(self, *, output: str = "") -> str:
        """A `loss_fn=` for such batches; `output` is what picks the logits from the output."""
        return (
            f"loss_fn=lambda model, batch: F.cross_entropy({self.code}{output}, "
            f'{self.labels_code}, reduction="none")'
        )

    def binary(self, *, column: bool) -> str:
        """A `loss_fn=` for a head of one logit, of shape (N, 1) if `column`, else (N,)."""
        squeezed = ".squeeze(1)" if column else ""
        return (
            f"loss_fn=lambda model, batch: F.binary_cross_entropy_with_logits({self.code}"
            f'{squeezed}, {self.labels_code}.float(), reduction="none")'
        )


def call_of(model: nn.Module, batch: Batch) -> Call:
    """The call for a batch `(x, y)` or a mapping with class indices; raises TypeError, with a
    `loss_fn=` for the batch at hand, where what is meant is not clear."""
    if isinstance(batch, Mapping):
        return _of_mapping(model, batch)
    if isinstance(batch, list | tuple) and len(batch) == 2 and not isinstance(batch, SampleList):
        return Call((batch[0],), {}, batch[1], "model(batch[0])", "batch[1]")
    length = f" of length {len(batch)}" if isinstance(batch, list | tuple) else ""
    raise TypeError(
        f"a batch must be (x, y) or a mapping with 'labels', got {type(batch).__name__}{length}; "
        f"change the loader's collate_fn, or say what to do with it: {_example(model, batch)}"
    )


def _of_mapping(model: nn.Module, batch: Mapping[Any, Any]) -> Call:
    label = label_key(batch)
    if label is None:
        raise TypeError(
            "a batch that is a mapping needs the key 'labels', or a single tensor of class indices "
            f"of shape (N,), got the keys {sorted(map(str, batch))}; rename the label column in "
            f"the collate_fn, or say what to do with it: {_example(model, batch)}"
        )
    rest = {key: value for key, value in batch.items() if key != label}
    named = _takes(model, rest)
    if not named:
        # Entries without a tensor, such as the paths of the images, are no input of the model.
        rest = {key: value for key, value in rest.items() if _is_input(value)}
        named = _takes(model, rest)
    code = ", ".join(f"{key}=batch[{key!r}]" for key in rest)
    if named and rest:
        return Call((), rest, batch[label], f"model({code})", f"batch[{label!r}]")
    if len(rest) == 1:
        ((key, value),) = rest.items()
        return Call((value,), {}, batch[label], f"model(batch[{key!r}])", f"batch[{label!r}]")
    raise TypeError(
        f"{type(model).__name__} takes none of {sorted(map(str, rest))} by name, so which of them "
        f"is its input is not clear; say so: {_example(model, batch)}"
    )


def _takes(model: nn.Module, inputs: Mapping[Any, Any]) -> bool:
    """Whether the model's forward takes these by name."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return all(isinstance(key, str) for key in inputs)
    return set(inputs) <= {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}


def _is_input(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_input, value))
    return isinstance(value, Tensor | Mapping)


def _example(model: nn.Module, batch: Batch) -> str:
    """A `loss_fn=` that takes the largest tensor for the input and the first class indices for the
    labels."""
    entries = dict(batch) if isinstance(batch, Mapping) else {}
    if isinstance(batch, list | tuple):
        entries = dict(enumerate(batch))
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    inputs = max(tensors, key=lambda key: tensors[key].numel(), default=0)
    whole = [
        key
        for key, value in tensors.items()
        if key != inputs and value.dim() == 1 and not value.is_floating_point()
    ]
    labels = next((key for key in whole if key in LABEL_NAMES), whole[0] if whole else "labels")
    named = isinstance(inputs, str) and _takes(model, {inputs: None})
    code = f"model({inputs}=batch[{inputs!r}])" if named else f"model(batch[{inputs!r}])"
    return Call((), {}, None, code, f"batch[{labels!r}]").loss() + f" ({SCORED})"
