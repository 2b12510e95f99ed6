"""An image classifier of transformers with its image processor, from a folder or the Hub."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification


def load(name: str, **arguments: Any) -> tuple[nn.Module, Any]:
    """The model, with float32 weights unless `arguments` say otherwise, and its processor.

    Raises OSError for what is no such folder.
    """
    model = AutoModelForImageClassification.from_pretrained(name, **arguments)
    processors: Any = AutoImageProcessor  # published without types
    return model, processors.from_pretrained(name)
