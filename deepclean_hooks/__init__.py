"""Machine unlearning inside the training loop you already have: exact, held bit for bit, and
measured.

import deepclean_hooks as deepclean
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deepclean_hooks._version import __version__
from deepclean_hooks.evaluate import Evaluation, evaluate
from deepclean_hooks.fisher import FisherDiagonal, fisher_diagonal
from deepclean_hooks.guard import Guard, GuardError
from deepclean_hooks.losses import LossFn
from deepclean_hooks.methods import DeepClean, Method
from deepclean_hooks.persample.explain import Explanation, explain
from deepclean_hooks.report import Report
from deepclean_hooks.session import Session

if TYPE_CHECKING:
    from deepclean_hooks.integrations.loop import unlearning
    from deepclean_hooks.integrations.recipe import unlearn

# Adapters are loaded when first asked for: some need libraries that the core does not.
_ADAPTERS = {"unlearning": "loop", "unlearn": "recipe"}

__all__ = [
    "DeepClean",
    "Evaluation",
    "Explanation",
    "FisherDiagonal",
    "Guard",
    "GuardError",
    "LossFn",
    "Method",
    "Report",
    "Session",
    "__version__",
    "evaluate",
    "explain",
    "fisher_diagonal",
    "unlearn",
    "unlearning",
]


def __getattr__(name: str) -> Any:
    if name not in _ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.integrations.{_ADAPTERS[name]}"), name)
