"""Machine unlearning inside the training loop you already have: exact, held bit for bit, and
measured.

import deepclean_hooks as deepclean
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deepclean_hooks import _moved
from deepclean_hooks._version import __version__
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.split import split
from deepclean_hooks.guard.guard import Guard, GuardError
from deepclean_hooks.measure.batch_mean import BatchMean
from deepclean_hooks.measure.fisher import FisherDiagonal, fisher_diagonal
from deepclean_hooks.methods import (
    ASSD,
    CT,
    LFSSD,
    MSG,
    SCRUB,
    SSD,
    Amnesiac,
    BadTeaching,
    ClassProjection,
    DeepClean,
    FineTune,
    FisherForgetting,
    FisherMask,
    L1Sparse,
    Method,
    NegGradPlus,
    RandomLabel,
    ReferenceGuided,
    Retrain,
    SalUn,
)
from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.metrics.evaluation import Evaluation
from deepclean_hooks.metrics.forgetting import Forgetting
from deepclean_hooks.persample.explain import Explanation, explain
from deepclean_hooks.report.report import Report
from deepclean_hooks.session import Session
from deepclean_hooks.tuning.choice import GammaChoice
from deepclean_hooks.tuning.gamma_auto import choose_gamma
from deepclean_hooks.tuning.gamma_sweep import GammaSweep, gamma_sweep

if TYPE_CHECKING:
    from deepclean_hooks.integrations.accelerator import DeepCleanHook
    from deepclean_hooks.integrations.classifier import ImageClassifier
    from deepclean_hooks.integrations.lightning_trainer import DeepCleanLightningCallback
    from deepclean_hooks.integrations.loop import unlearning
    from deepclean_hooks.integrations.recipe import unlearn
    from deepclean_hooks.integrations.stopping import WhenForgotten
    from deepclean_hooks.integrations.trainer import DeepCleanCallback

# Adapters are loaded when first asked for: some need libraries that the core does not.
_ADAPTERS = {
    "DeepCleanCallback": "trainer",
    "DeepCleanHook": "accelerator",
    "DeepCleanLightningCallback": "lightning_trainer",
    "ImageClassifier": "classifier",
    "WhenForgotten": "stopping",
    "unlearn": "recipe",
    "unlearning": "loop",
}

__all__ = [
    "ASSD",
    "CT",
    "LFSSD",
    "MSG",
    "SCRUB",
    "SSD",
    "Amnesiac",
    "BadTeaching",
    "BatchMean",
    "ClassProjection",
    "DeepClean",
    "DeepCleanCallback",
    "DeepCleanHook",
    "DeepCleanLightningCallback",
    "Evaluation",
    "Explanation",
    "FineTune",
    "FisherDiagonal",
    "FisherForgetting",
    "FisherMask",
    "Forgetting",
    "GammaChoice",
    "GammaSweep",
    "Guard",
    "GuardError",
    "ImageClassifier",
    "L1Sparse",
    "LossFn",
    "Method",
    "NegGradPlus",
    "RandomLabel",
    "ReferenceGuided",
    "Report",
    "Retrain",
    "SalUn",
    "Session",
    "WhenForgotten",
    "__version__",
    "choose_gamma",
    "evaluate",
    "explain",
    "fisher_diagonal",
    "gamma_sweep",
    "split",
    "unlearn",
    "unlearning",
]

_moved.forward()


def __getattr__(name: str) -> Any:
    if name not in _ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        adapter = import_module(f"{__name__}.integrations.{_ADAPTERS[name]}")
    except ModuleNotFoundError as missing:
        extra = "lightning" if missing.name == "lightning" else "trainer"
        raise ImportError(
            f"{name} needs {missing.name}: pip install 'deepclean-hooks[{extra}]'"
        ) from missing
    return getattr(adapter, name)
