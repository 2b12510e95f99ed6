"""The rows of the tables: each a method, how it is trained, and what it is measured on.

Nothing here was chosen by looking at test data: values are the papers', or where these need another
network or budget, those of our own documentation; `settings` of each row tells all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from deepclean_hooks import (
    ASSD,
    CT,
    MSG,
    SCRUB,
    SSD,
    Amnesiac,
    BadTeaching,
    BatchMean,
    ClassProjection,
    DeepClean,
    FineTune,
    FisherForgetting,
    L1Sparse,
    Method,
    NegGradPlus,
    RandomLabel,
    ReferenceGuided,
    SalUn,
)
from deepclean_hooks.tuning.search import search

from . import variants
from .cases import MEASURED, Case
from .setups import FIFTY, SCENARIOS, SHARES, forgotten_class


@dataclass(frozen=True)
class Optimizer:
    """Adam, or SGD with momentum 0.9 and weight decay 5e-4; cosine annealing to 0 in either
    case."""

    kind: str = "adam"
    lr: float = 1e-3

    def __call__(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=5e-4)
        return torch.optim.Adam(parameters, lr=self.lr)


@dataclass(frozen=True)
class Contender:
    """One row of the tables.

    `epochs`: None is the setup's. `stored`: whether the diagonal that was measured once serves.
    `few`: how many retain and forget samples are measured, None is all. `later`: the method of the
    rounds after the first, one an epoch, where there are rounds. `steps`: so many optimizer steps
    instead of whole epochs. `by_unlearn`: whether the method has to be told how long it trains, as
    `unlearn()` tells it.
    """

    method: Callable[[Case], Method]
    optimizer: Optimizer = Optimizer()
    epochs: int | None = None
    stored: bool = False
    few: Callable[[Case], tuple[int, int]] | None = None
    later: Callable[[Case], Method] | None = None
    steps: int | None = None
    by_unlearn: bool = False
    scenarios: tuple[str, ...] = SCENARIOS

    def serves(self, scenario: str) -> bool:
        """Whether the method is made for the scenario."""
        return scenario in self.scenarios or scenario.partition("-")[0] in self.scenarios


def _gamma(case: Case) -> float:
    return case.sets.gamma


def _classes(case: Case) -> int:
    return case.setup.images.kind.classes


def _fisher_forgetting(case: Case) -> Method:
    label = forgotten_class(case.scenario)
    return FisherForgetting(_classes(case), forgotten_class=label, seed=case.seed)


def _few_for_projection(case: Case) -> tuple[int, int]:
    """What Kodge et al. take on CIFAR-10: 900 of each side."""
    return 100 * (_classes(case) - 1), 900


def _searched_projection(case: Case) -> Method:
    """The alphas that score best on the samples that the projection is computed from."""
    kept, gone = _few_for_projection(case)
    sets = case.few(case.sets.forget, gone), case.few(case.sets.retain, kept)
    return search(
        case.copy(), *sets, ClassProjection().grid(), batch_size=MEASURED, progress=False
    )[0].method


def _few_for_expected_fisher(case: Case) -> tuple[int, int]:
    """All at full scale; C backward passes a sample are too many for a small machine."""
    whole = len(case.sets.retain)  # type: ignore[arg-type]  # a Subset has a length
    return (whole if case.setup.scale == "full" else 500), whole


def _deep_clean(literal: bool) -> Contender:
    return Contender(
        lambda case: DeepClean(gamma=_gamma(case), one_dimensional=literal), stored=True
    )


MAIN: dict[str, Contender] = {
    "fine-tune": Contender(lambda case: FineTune()),
    "deepclean": _deep_clean(literal=False),
    "deepclean-literal": _deep_clean(literal=True),
    "zeroed": Contender(lambda case: variants.ZeroOnly(gamma=_gamma(case)), stored=True),
    "zeroed-literal": Contender(
        lambda case: variants.ZeroOnly(gamma=_gamma(case), one_dimensional=True), stored=True
    ),
    "l1-sparse": Contender(lambda case: L1Sparse(), by_unlearn=True),
    "ssd": Contender(lambda case: SSD(estimator=BatchMean(batch_size=64, seed=case.seed))),
    "ssd-exact": Contender(lambda case: SSD(alpha=5.0), stored=True),
    "assd": Contender(lambda case: ASSD(), stored=True),
    "class-projection": Contender(
        lambda case: ClassProjection(), few=_few_for_projection, scenarios=("class",)
    ),
    # As its authors train, not as in DeepClean's table (1e-3, 10 epochs).
    "teacher": Contender(
        lambda case: BadTeaching(seed=case.seed, as_published=True),
        optimizer=Optimizer(lr=1e-4),
        epochs=1,
    ),
    "salun": Contender(
        lambda case: SalUn(seed=case.seed, as_published=True), optimizer=Optimizer("sgd", 0.013)
    ),
    "msg": Contender(lambda case: MSG(seed=case.seed), optimizer=Optimizer("sgd", 1e-3)),
    "fisher-forgetting": Contender(_fisher_forgetting, few=_few_for_expected_fisher),
}

MORE: dict[str, Contender] = {
    "neggrad+": Contender(lambda case: NegGradPlus()),
    "random-label": Contender(
        lambda case: RandomLabel(seed=case.seed, as_published=True),
        optimizer=Optimizer("sgd", 0.013),
    ),
    "amnesiac": Contender(
        lambda case: Amnesiac(seed=case.seed, as_published=True), optimizer=Optimizer(lr=1e-4)
    ),
    "scrub": Contender(lambda case: SCRUB(), optimizer=Optimizer("sgd", 5e-4)),
    "ct": Contender(lambda case: CT(), optimizer=Optimizer("sgd", 1e-3)),
}


def _at_gamma(gamma: float) -> Contender:
    return Contender(lambda case: DeepClean(gamma=gamma), stored=True)


def _guided(
    lr: float,
    weight: float,
    *,
    match: Literal["rank", "mean"] = "rank",
    selected: bool = False,
    steps: int | None = None,
    answers: int | None = None,
) -> Contender:
    """Reference-guided, on everything or on W_f alone, nothing reset; `answers`: so many held-out
    samples, not all."""

    def method(case: Case) -> Method:
        train = DeepClean(gamma=_gamma(case)) if selected else None
        held_out = case.setup.held_out
        return ReferenceGuided(
            held_out if answers is None else case.few(held_out, answers),
            match=match,
            weight=weight,
            train=train,
            seed=case.seed,
        )

    return Contender(
        method,
        Optimizer("sgd", lr),
        epochs=None if steps is None else 1,
        stored=selected,
        steps=steps,
        scenarios=(*SHARES, *FIFTY),
    )


# For networks that know their data by heart; these need held-out data, as `saturated` keeps them.
GUIDED: dict[str, Contender] = {
    "careful": Contender(lambda case: DeepClean()),
    "fine-tune-sgd": Contender(lambda case: FineTune(), Optimizer("sgd", 0.1)),
    "guided": _guided(0.1, 0.3),
    "guided-wf": _guided(0.1, 0.5, selected=True),
    "guided-mean": _guided(0.1, 0.3, match="mean"),
    "guided-few": _guided(0.02, 1.0, steps=100),
    "guided-fewer": _guided(0.01, 1.0, steps=80, answers=1000),
}

ABLATIONS: dict[str, Contender] = {
    "deepclean-10%": Contender(
        lambda case: DeepClean(gamma=_gamma(case), max_selected=0.1), stored=True
    ),
    "deepclean-lr-3e-3": Contender(
        lambda case: DeepClean(gamma=_gamma(case)), Optimizer(lr=3e-3), stored=True
    ),
    "fine-tune-lr-3e-3": Contender(lambda case: FineTune(), Optimizer(lr=3e-3)),
    "all-free": Contender(lambda case: variants.AllFree(gamma=_gamma(case)), stored=True),
    "all-free-lr-3e-3": Contender(
        lambda case: variants.AllFree(gamma=_gamma(case)), Optimizer(lr=3e-3), stored=True
    ),
    "dampened": Contender(lambda case: variants.Dampened(gamma=_gamma(case)), stored=True),
    "initial-values": Contender(
        lambda case: variants.ToInitialValues(gamma=_gamma(case), seed=case.seed), stored=True
    ),
    "quota": Contender(lambda case: variants.Quota(gamma=_gamma(case)), stored=True),
    "batch-mean": Contender(lambda case: variants.OfBatchMeans(gamma=_gamma(case), seed=case.seed)),
    "gamma-1.5": _at_gamma(1.5),
    "gamma-3": _at_gamma(3.0),
    "gamma-1": _at_gamma(1.0),
    "dynamic": Contender(
        lambda case: DeepClean(gamma=_gamma(case)),
        stored=True,
        later=lambda case: DeepClean(gamma=_gamma(case)),
    ),
    "dynamic-kept": Contender(
        lambda case: DeepClean(gamma=_gamma(case)),
        stored=True,
        later=lambda case: variants.Reselected(gamma=_gamma(case)),
    ),
}

# Run where they are asked for by name.
ASKED: dict[str, Contender] = {
    # In the order of SSD's own code: the retain set, then the forget set.
    "ssd-in-order": Contender(lambda case: SSD(estimator=BatchMean(batch_size=64))),
    "class-projection-all": Contender(lambda case: ClassProjection(), scenarios=("class",)),
    "class-projection-searched": Contender(
        _searched_projection, few=_few_for_projection, scenarios=("class",)
    ),
}

CONTENDERS = {**MAIN, **MORE, **GUIDED, **ABLATIONS, **ASKED}
# What the plot of cost against gap has at other budgets.
BUDGETED = ("fine-tune", "deepclean", "all-free", "l1-sparse", "salun")
AT = "@"


def contender(name: str) -> Contender:
    """The row of that name; `NAME@EPOCHS` is the same with another budget."""
    known, _, budget = name.partition(AT)
    if known not in CONTENDERS:
        raise ValueError(f"method must be one of {', '.join(CONTENDERS)}, got {name!r}")
    found = CONTENDERS[known]
    if not budget:
        return found
    return Contender(**{**vars(found), "epochs": int(budget)})
