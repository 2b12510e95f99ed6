"""What each gamma would select and do, from one measurement: the data of the paper's Figures 3 and
4."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deepclean_hooks.data import losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data, Samples, sets_of
from deepclean_hooks.guard.guard import NormStatistics
from deepclean_hooks.measure.request import Measured, measured
from deepclean_hooks.methods import DEFAULT
from deepclean_hooks.methods.method import Method, Selection
from deepclean_hooks.metrics.evaluate import evaluate
from deepclean_hooks.model.wrappers import require_trainable, unwrap
from deepclean_hooks.ranks import fsdp
from deepclean_hooks.report import curves
from deepclean_hooks.tuning import copies
from deepclean_hooks.tuning.copies import Train

GAMMAS = (1.0, 1.1, 1.5, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class GammaPoint:
    """One gamma: how many entries it selects of each parameter, and the figures of the model with
    these at 0 (`zeroed`) and after the fine-tune (`tuned`; empty without one)."""

    gamma: float
    selected: dict[str, int]
    zeroed: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)

    @property
    def selected_entries(self) -> int:
        """The size of W_f."""
        return sum(self.selected.values())


@dataclass(frozen=True)
class GammaSweep:
    """The points in rising order of gamma; `entries`: of each parameter that may be selected;
    `original`: the figures of the model as it is."""

    points: tuple[GammaPoint, ...]
    entries: dict[str, int]
    trainable_entries: int
    original: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        points = [
            {
                **dataclasses.asdict(point),
                "selected_entries": point.selected_entries,
                "selected_fraction": point.selected_entries / self.trainable_entries,
            }
            for point in self.points
        ]
        return {
            "points": points,
            "entries": dict(self.entries),
            "trainable_entries": self.trainable_entries,
            "original": dict(self.original),
        }

    def __str__(self) -> str:
        """A line for each gamma."""
        return "\n".join(self._line(point) for point in self.points)

    def _line(self, point: GammaPoint) -> str:
        parts = [f"gamma {point.gamma:g}: {point.selected_entries / self.trainable_entries:7.2%}"]
        for words, figures in (("zeroed", point.zeroed), ("tuned", point.tuned)):
            shown = [
                f"{name.removesuffix('.accuracy')} {value:.1f}"
                for name, value in figures.items()
                if name.count(".") == 1 and name.endswith(".accuracy")
            ]
            parts += [f"{words}: accuracy % {', '.join(shown)}"] if shown else []
        return "; ".join(parts)

    def plot_selection(self, path: str | os.PathLike[str]) -> None:
        """Draws the selected share of each parameter against gamma (the paper's Figure 3) into an
        SVG file."""
        curves.write(curves.selection(self.to_dict()), path)

    def plot_behaviour(self, path: str | os.PathLike[str]) -> None:
        """Draws the accuracies against gamma (the paper's Figure 4) into an SVG file; raises
        ValueError if none were computed."""
        drawing = curves.behaviour(self.to_dict())
        if drawing is None:
            raise ValueError("the sweep has no figures to draw; run gamma_sweep with scores=True")
        curves.write(drawing, path)


def gamma_sweep(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    gammas: Sequence[float] = GAMMAS,
    method: Method | None = None,
    fine_tune: Train | None = None,
    scores: bool = True,
    test: Data | None = None,
    forget_test: Data | None = None,
    loss_fn: LossFn | None = None,
    norm_statistics: NormStatistics = "update",
    batch_size: int | None = None,
    collate_fn: Any = None,
    progress: bool = True,
) -> GammaSweep:
    """What the method would select for each gamma, and how the model behaves with it; both sets are
    measured once and the model is left as it was.

    `method`, DeepClean by default, gives the other settings; of another method than DeepClean the
    values are those of its `knob`. With `scores` each gamma's zeroed model is evaluated on the
    sets given, a forward pass each; with `fine_tune`, a callable that trains the model it is given,
    a copy is trained with all but W_f held, and evaluated too. Choosing gamma by `test` tunes on
    test data: leave it out and read the figures of forget and retain.
    """
    base = method or DEFAULT
    methods = grid(base, gammas)
    fsdp.refuse_sharded(unwrap(model), "gamma_sweep")
    given = {"forget": forget, "retain": retain, "test": test, "forget_test": forget_test}
    sets = sets_of(given, batch_size=batch_size, collate_fn=collate_fn)
    loss = loss_fn or losses.cross_entropy
    found = measured(base, model, sets["forget"], sets["retain"], loss_fn=loss, progress=progress)
    tried = _Trial(unwrap(model), found, sets, scores, fine_tune, norm_statistics, progress)
    points = []
    for one in methods:
        selection = one.select(found.forget, found.retain)
        counts = {name: int(mask.sum()) for name, mask in selection.masks.items()}
        points.append(GammaPoint(one.number, counts, *tried.of(one, selection)))
    return GammaSweep(
        tuple(points),
        {name: total.numel() for name, total in found.forget.sums.items()},
        sum(p.numel() for p in require_trainable(unwrap(model)).values()),
        tried.figures(unwrap(model)),
    )


def grid(base: Method, gammas: Sequence[float] = GAMMAS) -> list[Method]:
    """The method with each gamma, in rising order; raises ValueError for a bad or no gamma."""
    methods = [base.at(gamma) for gamma in sorted(set(gammas))]
    if not methods:
        raise ValueError("gammas is empty; give at least one")
    return methods


@dataclass(frozen=True)
class _Trial:
    """How one selection is tried out, on copies of the model."""

    model: nn.Module
    measured: Measured
    sets: Mapping[str, Samples]
    scores: bool
    fine_tune: Train | None
    norm_statistics: NormStatistics
    progress: bool

    def of(self, method: Method, selection: Selection) -> tuple[dict[str, float], dict[str, float]]:
        """The figures after the reset and after the fine-tune."""
        if not self.scores and self.fine_tune is None:
            return {}, {}
        copied = copies.reset(self.model, method, selection, self.measured)
        zeroed = self.figures(copied)
        if self.fine_tune is None:
            return zeroed, {}
        copies.tune(copied, method.free(selection), self.fine_tune, self.norm_statistics)
        return zeroed, self.figures(copied)

    def figures(self, model: nn.Module) -> dict[str, float]:
        if not self.scores:
            return {}
        return evaluate(
            model,
            forget=self.sets["forget"],
            retain=self.sets["retain"],
            test=self.sets.get("test"),
            forget_test=self.sets.get("forget_test"),
            membership=False,
            progress=self.progress,
        ).figures()
