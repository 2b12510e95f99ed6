"""One row a method, and every method that there is: a method without a row fails a test."""

from __future__ import annotations

import deepclean_hooks as deepclean
from deepclean_hooks import methods
from deepclean_hooks.measure.batch_mean import BatchMean, OutputMagnitude
from deepclean_hooks.testing import held_out

METHODS: dict[str, deepclean.Method] = {
    "DeepClean": deepclean.DeepClean(gamma=1.1),
    "DeepClean, all parameters": deepclean.DeepClean(gamma=1.1, one_dimensional=True),
    "SSD": deepclean.SSD(alpha=1.5),
    "SSD, batch means": deepclean.SSD(alpha=1.2, estimator=BatchMean(8)),
    "SSD, fine-tuned": deepclean.SSD(alpha=1.5, fine_tune=True),
    "LFSSD": deepclean.LFSSD(alpha=1.1, estimator=OutputMagnitude(1)),
    "ASSD": deepclean.ASSD(),
    "ClassProjection": deepclean.ClassProjection(),
    "ReferenceGuided": deepclean.ReferenceGuided(held_out()),
    "ReferenceGuided, mean": deepclean.ReferenceGuided(held_out(), "mean"),
    "ReferenceGuided, W_f": deepclean.ReferenceGuided(
        held_out(), train=deepclean.DeepClean(gamma=1.1)
    ),
    "ReferenceGuided, reset": deepclean.ReferenceGuided(
        held_out(), train=deepclean.DeepClean(gamma=1.1), reset=True
    ),
    "FineTune": deepclean.FineTune(),
    "Retrain": deepclean.Retrain(),
    "L1Sparse": deepclean.L1Sparse(epochs=2, steps_per_epoch=3),
    "NegGradPlus": deepclean.NegGradPlus(),
    "NegGradPlus, W_f": deepclean.NegGradPlus(clip=None, train=deepclean.DeepClean(gamma=1.1)),
    "RandomLabel": deepclean.RandomLabel(),
    "RandomLabel, as published": deepclean.RandomLabel(as_published=True),
    "Amnesiac": deepclean.Amnesiac(),
    "Amnesiac, as published": deepclean.Amnesiac(as_published=True),
    "SalUn": deepclean.SalUn(),
    "SalUn, as published": deepclean.SalUn(as_published=True),
    "MSG": deepclean.MSG(),
    "CT": deepclean.CT(),
    "BadTeaching": deepclean.BadTeaching(),
    "BadTeaching, as published": deepclean.BadTeaching(as_published=True),
    "SCRUB": deepclean.SCRUB(),
    "FisherForgetting": deepclean.FisherForgetting(classes=4),
    "FisherMask": deepclean.FisherMask(classes=4, share=0.1),
}
ADDITIVE = {name: method for name, method in METHODS.items() if method.term() is not None}


def every_method() -> dict[str, type[deepclean.Method]]:
    """The methods of the package by their public names."""
    public = {name: getattr(methods, name) for name in methods.__all__}
    return {
        name: kind
        for name, kind in public.items()
        if isinstance(kind, type(deepclean.Method))  # Python 3.10: dict[...] is a type
        and issubclass(kind, deepclean.Method)
        and kind is not deepclean.Method
    }
