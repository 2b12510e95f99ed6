"""The run of an evaluation: what a model knows of the forget, retain and test sets, and the gap of
each figure to gold models.

N: samples of a set, C: classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data.samples import Data, Samples, samples_of
from deepclean_hooks.metrics.attack import Attack, confidence_svc, loss_regression, thresholds
from deepclean_hooks.metrics.calibration import calibration_error
from deepclean_hooks.metrics.distance import to_gold, zrf
from deepclean_hooks.metrics.entropy import entropy_regression
from deepclean_hooks.metrics.evaluation import (
    NO_GOLD,
    NO_UNTRAINED,
    ClassScore,
    Evaluation,
    SetScore,
)
from deepclean_hooks.metrics.gold import average_gap, spreads
from deepclean_hooks.metrics.histogram import histograms
from deepclean_hooks.metrics.outputs import Outputs, collect
from deepclean_hooks.metrics.probe import linear_probe
from deepclean_hooks.metrics.rmia import rmia

Gold = nn.Module | Evaluation | Sequence[nn.Module | Evaluation]
"""The model or models, trained without the forget set, that a model is compared with."""


def evaluate(
    model: nn.Module,
    *,
    forget: Data | Samples | None = None,
    retain: Data | Samples | None = None,
    test: Data | Samples | None = None,
    forget_test: Data | Samples | None = None,
    gold: Gold | None = None,
    untrained: nn.Module | None = None,
    batch_size: int | None = None,
    collate_fn: Any = None,
    membership: bool = True,
    probe: bool = False,
    progress: bool | str = True,
) -> Evaluation:
    """Accuracy, loss, calibration, membership inference and distances to gold of a model on the
    sets given, each sample once over all ranks, in one forward pass of each model over each set.

    `forget_test` is the part of the test data that resembles the forget set (a forgotten class,
    say); membership inference needs forget, retain and test. `gold` is a model trained without the
    forget set, or its Evaluation on the same sets, or several of either, whose differences say how
    large a gap means nothing. `untrained`, a model of the same kind with fresh weights, is for ZRF;
    `probe=True` asks for the linear probe. The models run in eval mode, without autocast,
    half-precision weights as float32, and are left as they were. What cannot be computed says why.
    A progress bar names each pass; a text as `progress` is how it calls the model.
    Raises ValueError for no or an empty set, for outputs that are NaN, and for a gold Evaluation of
    other data.
    """
    given = {"forget": forget, "retain": retain, "test": test, "forget_test": forget_test}
    with ranks.fail_together():
        sets = {
            name: samples_of(data, name=name, batch_size=batch_size, collate_fn=collate_fn)
            for name, data in given.items()
            if data is not None
        }
    if not sets:
        raise ValueError(f"evaluate needs at least one of {', '.join(given)}; none was given")
    golds = several(gold)
    for retrained in golds:
        if isinstance(retrained, Evaluation):
            require_same_data(retrained, sets)
    models = 1 + sum(isinstance(retrained, nn.Module) for retrained in golds)
    run = _Run(sets, models, untrained, membership, probe, bool(progress))
    result = run.of(model, progress if isinstance(progress, str) else "the model")
    known = [
        gold if isinstance(gold, Evaluation) else run.of(gold, f"gold model {i}")
        for i, gold in enumerate(golds, 1)
    ]
    return _against(known, result, membership) if known else result


def several(gold: Gold | None) -> list[nn.Module | Evaluation]:
    """The gold models or Evaluations as a list; raises TypeError for anything else."""
    if gold is None:
        return []
    # Not whatever can be iterated over: nn.Sequential can, and a path.
    several: list[Any] = list(gold) if isinstance(gold, list | tuple) else [gold]
    for each in several:
        if not isinstance(each, nn.Module | Evaluation):
            raise TypeError(
                f"gold must be a model, an Evaluation or several of these, got {each!r}; load a "
                "stored model first, and pass the module"
            )
    return several


class _Run:
    """One call of `evaluate`: the same sets and questions for each model."""

    def __init__(
        self,
        sets: Mapping[str, Samples],
        models: int,
        untrained: nn.Module | None,
        attacked: bool,
        probed: bool,
        progress: bool,
    ) -> None:
        self.sets, self.attacked, self.probed, self.progress = sets, attacked, probed, progress
        asked = untrained is not None and "forget" in sets
        self.passes, self.started = models * len(sets) + asked, 0
        self.untrained: Tensor | None = None
        self.no_zrf = NO_UNTRAINED
        if untrained is not None and asked:
            self.untrained = self._outputs(untrained, "forget", "the untrained model").logits
        if untrained is not None and self.untrained is None:
            self.no_zrf = "it needs a forget set whose logits are kept"

    def of(self, model: nn.Module, words: str) -> Evaluation:
        start = time.perf_counter()
        outputs = {name: self._outputs(model, name, words) for name in self.sets}
        logits = outputs["forget"].logits if "forget" in outputs else None
        scores = {name: _score(of_set) for name, of_set in outputs.items()}
        probe = linear_probe(outputs, self.probed)
        drawn = {name: histograms(of_set) for name, of_set in outputs.items()}
        attacks = _attacks(outputs) if self.attacked else {}
        return Evaluation(
            scores,
            time.perf_counter() - start,
            attacks=attacks,
            distances=to_gold(None, [], NO_GOLD),
            probe=probe,
            zrf=zrf(logits, self.untrained, self.no_zrf),
            histograms=drawn,
            # Features, by far the most of it, have served the probe.
            outputs={
                name: replace(of_set, features=None, positions=None)
                for name, of_set in outputs.items()
            },
        )

    def _outputs(self, model: nn.Module, name: str, words: str) -> Outputs:
        self.started += 1
        label = f"scoring {words}: {name} (pass {self.started} of {self.passes})"
        return collect(
            model,
            self.sets[name],
            name,
            logits=name == "forget",
            features=self.probed,
            progress=label if self.progress else None,
        )


def _score(outputs: Outputs) -> SetScore:
    per_class = {}
    for label in sorted(set(outputs.labels.tolist())):
        among = outputs.labels == label
        count, right = int(among.sum()), int(outputs.correct[among].sum())
        per_class[label] = ClassScore(count, 100 * right / count, float(outputs.loss[among].mean()))
    count, right = len(outputs.labels), int(outputs.correct.sum())
    off = calibration_error(outputs.highest, outputs.correct)
    return SetScore(count, 100 * right / count, float(outputs.loss.mean()), per_class, off)


def _attacks(outputs: dict[str, Outputs]) -> dict[str, Attack]:
    return {
        "entropy_regression": entropy_regression(outputs),
        "confidence_svc": confidence_svc(outputs),
        "loss_regression": loss_regression(outputs),
        **thresholds(outputs),
        "rmia": rmia(outputs, []),
    }


def require_same_data(gold: Evaluation, sets: Mapping[str, Samples]) -> None:
    """Raises ValueError for a gold Evaluation that lacks a set."""
    missing = [name for name in sets if name not in gold.sets]
    if missing:
        raise ValueError(
            f"the gold Evaluation has no figures for {', '.join(missing)}; evaluate gold on the "
            "same sets, or pass the gold model itself"
        )


def _against(golds: list[Evaluation], result: Evaluation, attacked: bool) -> Evaluation:
    for gold in golds:
        _require_same_samples(gold, result)
    if attacked:
        result = _with_rmia(result, golds)
        golds = [
            _with_rmia(gold, golds[:i] + golds[i + 1 :]) if len(golds) > 1 else gold
            for i, gold in enumerate(golds)
        ]
    figures = [gold.figures() for gold in golds]
    spread = spreads(figures)
    gaps = {
        name: figure - spread[name].mean
        for name, figure in result.figures().items()
        if name in spread
    }
    outputs = [each.outputs.get("forget") for each in (result, *golds)]
    logits = [forget.logits for forget in outputs if forget is not None]
    why = "it needs a forget set whose logits are kept"
    if logits:
        why = next(iter(result.outputs["forget"].reasons), why)
    return replace(
        result,
        gold=golds[0],
        golds=tuple(golds),
        gaps=gaps,
        spread=spread,
        distances=to_gold(logits[0] if logits else None, logits[1:], why),
        average_gap=average_gap(gaps, figures),
    )


def _with_rmia(judged: Evaluation, references: list[Evaluation]) -> Evaluation:
    attack = rmia(judged.outputs, [reference.outputs for reference in references])
    return replace(judged, attacks={**judged.attacks, "rmia": attack})


def _require_same_samples(gold: Evaluation, result: Evaluation) -> None:
    for name, scores in result.sets.items():
        ours = {label: of_class.count for label, of_class in scores.per_class.items()}
        per_class = gold.sets[name].per_class
        theirs = {label: of_class.count for label, of_class in per_class.items()}
        if ours != theirs:
            raise ValueError(
                f"the gold Evaluation is of another {name} set: samples by class {theirs}, here "
                f"{ours}; pass the gold model itself"
            )
