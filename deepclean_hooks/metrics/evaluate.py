"""What a model knows of the forget, retain and test sets, and the gap of each figure to gold
models.

N: samples of a set, C: classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from deepclean_hooks import ranks
from deepclean_hooks.data.samples import Data, Samples, samples_of
from deepclean_hooks.metrics.attack import Attack, confidence_svc, loss_regression, thresholds
from deepclean_hooks.metrics.calibration import calibration_error
from deepclean_hooks.metrics.distance import ZRF, Measured, to_gold, zrf
from deepclean_hooks.metrics.entropy import Membership, entropy_attack
from deepclean_hooks.metrics.gold import AVERAGE_GAP, Spread, average_gap, spreads
from deepclean_hooks.metrics.histogram import histograms
from deepclean_hooks.metrics.outputs import Outputs, collect
from deepclean_hooks.metrics.probe import MEANING as PROBE
from deepclean_hooks.metrics.probe import linear_probe
from deepclean_hooks.metrics.rmia import rmia

NO_GOLD = "it needs a gold model: pass gold="
NO_UNTRAINED = "it needs an untrained model: pass untrained="
_NO_PROBE = Measured(PROBE, reason="not asked for (pass probe=True)")
_NO_ZRF = Measured(ZRF, reason=NO_UNTRAINED)
_NO_AVERAGE = Measured(AVERAGE_GAP, reason=NO_GOLD)


@dataclass(frozen=True)
class ClassScore:
    """The figures of one class within a set; accuracy in per cent, loss in nats a sample."""

    count: int
    accuracy: float
    loss: float


@dataclass(frozen=True)
class SetScore:
    """The figures of one set, means over its samples; accuracy in per cent, loss in nats a sample.

    `per_class` holds the classes that occur among the set's labels, in order, and no others.
    `calibration_error`: the expected calibration error in per cent, 15 bins of equal width.
    """

    count: int
    accuracy: float
    loss: float
    per_class: dict[int, ClassScore]
    calibration_error: float


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model, by set name, and the same of the gold models if any were given.

    `membership` is the entropy attack of DeepClean and SSD, `attacks` all others by name;
    `distances` are to the gold models. `gaps`: this model's figures minus the mean of the gold
    models' (`golds`, of which `gold` is the first); `spread`: each figure among the gold models.
    `seconds` is the wall-clock time spent on this model. `outputs` holds the outputs by sample, for
    figures of your own, and is not part of `to_dict`.
    """

    sets: dict[str, SetScore]
    membership: Membership
    seconds: float
    gold: Evaluation | None = None
    gaps: dict[str, float] = field(default_factory=dict)
    attacks: dict[str, Attack] = field(default_factory=dict)
    distances: dict[str, Measured] = field(default_factory=dict)
    probe: Measured = _NO_PROBE
    zrf: Measured = _NO_ZRF
    average_gap: Measured = _NO_AVERAGE
    golds: tuple[Evaluation, ...] = ()
    spread: dict[str, Spread] = field(default_factory=dict)
    histograms: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    outputs: dict[str, Outputs] = field(default_factory=dict, repr=False, compare=False)

    def figures(self) -> dict[str, float]:
        """Every figure by name: `forget.accuracy`, `forget.loss`, `forget.calibration_error`,
        `forget.3.accuracy` (class 3), `membership.rate`, `attack.loss_regression.accuracy`."""
        named: dict[str, float] = {}
        for name, scores in self.sets.items():
            named[f"{name}.accuracy"], named[f"{name}.loss"] = scores.accuracy, scores.loss
            named[f"{name}.calibration_error"] = scores.calibration_error
            for label, one in scores.per_class.items():
                named[f"{name}.{label}.accuracy"] = one.accuracy
                named[f"{name}.{label}.loss"] = one.loss
        if self.membership.rate is not None:
            named["membership.rate"] = self.membership.rate
        for name, attack in self.attacks.items():
            named |= {f"attack.{name}.{figure}": v for figure, v in attack.figures.items()}
        for name, measured in (("probe", self.probe), ("zrf", self.zrf)):
            if measured.value is not None:
                named[name] = measured.value
        return named

    def within_spread(self) -> dict[str, bool]:
        """For each gap whether it is no larger than the largest difference between two gold models;
        empty with fewer than two of these."""
        held = {name: self.spread[name].holds(gap) for name, gap in self.gaps.items()}
        return {name: one for name, one in held.items() if one is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, the same after a round trip through JSON."""
        return {
            "sets": {
                name: {
                    **vars(scores),
                    "per_class": {str(c): dict(vars(one)) for c, one in scores.per_class.items()},
                }
                for name, scores in self.sets.items()
            },
            "membership": dict(vars(self.membership)),
            "attacks": {name: attack.to_dict() for name, attack in self.attacks.items()},
            "distances": {name: dict(vars(one)) for name, one in self.distances.items()},
            "probe": dict(vars(self.probe)),
            "zrf": dict(vars(self.zrf)),
            "average_gap": dict(vars(self.average_gap)),
            "histograms": {name: dict(counts) for name, counts in self.histograms.items()},
            "seconds": self.seconds,
            "gaps": dict(self.gaps),
            "spread": {name: dict(vars(one)) for name, one in self.spread.items()},
            "within_spread": self.within_spread(),
            "gold": None if self.gold is None else self.gold.to_dict(),
        }

    def __str__(self) -> str:
        """The figures as a table, each with its gap to the gold models."""
        head = f"{'':12}{'samples':>9}{'accuracy %':>20}{'loss':>22}{'calibration %':>20}"
        lines = [head + ("    (in brackets: minus gold)" if self.gaps else "")]
        for name, scores in self.sets.items():
            accuracy = self._with_gap(f"{name}.accuracy", f"{scores.accuracy:.2f}", ".2f")
            loss = self._with_gap(f"{name}.loss", f"{scores.loss:.4f}", ".4f")
            off = scores.calibration_error
            error = self._with_gap(f"{name}.calibration_error", f"{off:.2f}", ".2f")
            lines.append(f"{name:12}{scores.count:>9}{accuracy:>20}{loss:>22}{error:>20}")
        for name, scores in self.sets.items():
            lines.append(f"{name} by class, accuracy %: {_by_class(scores)}")
        lines.append(self._membership_line())
        lines += [self._attack_line(name, attack) for name, attack in self.attacks.items()]
        others = {"probe": self.probe, "zrf": self.zrf, "average gap": self.average_gap}
        lines += [self._measured_line(n, one) for n, one in {**self.distances, **others}.items()]
        if self.golds[1:]:
            inside = self.within_spread()
            outside = [name for name, within in inside.items() if not within]
            lines.append(
                f"{len(inside) - len(outside)} of {len(inside)} gaps are within what the "
                f"{len(self.golds)} gold models differ by; beyond it: {', '.join(outside) or '-'}"
            )
        lines.append(f"seconds: {self.seconds:.2f}")
        return "\n".join(lines)

    def _with_gap(self, name: str, figure: str, form: str) -> str:
        return f"{figure} ({self.gaps[name]:+{form}})" if name in self.gaps else figure

    def _membership_line(self) -> str:
        found = self.membership
        if found.rate is None:
            return f"membership inference: not computed: {found.reason}"
        rate = self._with_gap("membership.rate", f"{found.rate:.2f} %", ".2f")
        return (
            f"membership inference: {rate} of forget called members; feature: {found.feature}; "
            f"attacker: {found.attacker}, fitted on {found.fitted_on}, right on "
            f"{found.attacker_accuracy:.1f} % of these (balanced)"
        )

    def _attack_line(self, name: str, attack: Attack) -> str:
        told = [
            f"{figure} {self._with_gap(f'attack.{name}.{figure}', f'{value:.3f}', '.3f')}"
            for figure, value in attack.figures.items()
        ]
        told += [f"{figure} not computed: {why}" for figure, why in attack.reasons.items()]
        return f"attack {name}: {'; '.join(told)}"

    def _measured_line(self, name: str, one: Measured) -> str:
        if one.value is None:
            return f"{name}: not computed: {one.reason}"
        among = "" if one.gold_to_gold is None else f" (between gold models {one.gold_to_gold:.4f})"
        return f"{name}: {self._with_gap(name, f'{one.value:.4f}', '.4f')}{among}"


Gold = nn.Module | Evaluation | Sequence[nn.Module | Evaluation]
"""What a model is compared with: one or several, trained without the forget set."""


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
    progress: bool = True,
) -> Evaluation:
    """Accuracy, loss, calibration, membership inference and distances to gold of a model on the
    sets given, each sample once over all ranks, in one forward pass of each model over each set.

    `forget_test` is the part of the test data that resembles the forget set (a forgotten class,
    say); membership inference needs forget, retain and test. `gold` is a model trained without the
    forget set, or its Evaluation on the same sets, or several of either, whose differences say how
    large a gap means nothing. `untrained`, a model of the same kind with fresh weights, is for ZRF;
    `probe=True` asks for the linear probe. The models run in eval mode, without autocast,
    half-precision weights as float32, and are left as they were. What cannot be computed says why.
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
    golds = _several(gold)
    for one in golds:
        if isinstance(one, Evaluation):
            _require_same_data(one, sets)
    run = _Run(sets, untrained, membership, probe, progress)
    result = run.of(model)
    known = [one if isinstance(one, Evaluation) else run.of(one) for one in golds]
    return _against(known, result, membership) if known else result


def _several(gold: Gold | None) -> list[nn.Module | Evaluation]:
    if gold is None:
        return []
    # A model may be a sequence itself: nn.Sequential, nn.ModuleList.
    several = [gold] if isinstance(gold, nn.Module | Evaluation) else list(gold)
    for one in several:
        if not isinstance(one, nn.Module | Evaluation):
            raise TypeError(f"gold must be a model, an Evaluation or several of these, got {one!r}")
    return several


class _Run:
    """One call of `evaluate`: the same sets and questions for each model."""

    def __init__(
        self,
        sets: Mapping[str, Samples],
        untrained: nn.Module | None,
        attacked: bool,
        probed: bool,
        progress: bool,
    ) -> None:
        self.sets, self.attacked, self.probed, self.progress = sets, attacked, probed, progress
        self.untrained: Tensor | None = None
        self.no_zrf = NO_UNTRAINED
        if untrained is not None and "forget" in sets:
            self.untrained = self._outputs(untrained, "forget").logits
        if untrained is not None and self.untrained is None:
            self.no_zrf = "it needs a forget set whose logits are kept"

    def of(self, model: nn.Module) -> Evaluation:
        start = time.perf_counter()
        outputs = {name: self._outputs(model, name) for name in self.sets}
        logits = outputs["forget"].logits if "forget" in outputs else None
        scores = {name: _score(one) for name, one in outputs.items()}
        found = _membership(outputs, self.attacked)
        probe = linear_probe(outputs, self.probed)
        drawn = {name: histograms(one) for name, one in outputs.items()}
        attacks = _attacks(outputs) if self.attacked else {}
        return Evaluation(
            scores,
            found,
            time.perf_counter() - start,
            attacks=attacks,
            distances=to_gold(None, [], NO_GOLD),
            probe=probe,
            zrf=zrf(logits, self.untrained, self.no_zrf),
            histograms=drawn,
            # Features, by far the most of it, have served the probe.
            outputs={
                name: replace(one, features=None, positions=None) for name, one in outputs.items()
            },
        )

    def _outputs(self, model: nn.Module, name: str) -> Outputs:
        return collect(
            model,
            self.sets[name],
            name,
            logits=name == "forget",
            features=self.probed,
            progress=self.progress,
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


def _membership(outputs: Mapping[str, Outputs], asked: bool) -> Membership:
    if not asked:
        return Membership(reason="not asked for (membership=False)")
    missing = [name for name in ("forget", "retain", "test") if name not in outputs]
    if missing:
        return Membership(reason=f"it needs forget, retain and test; missing: {', '.join(missing)}")
    return entropy_attack(
        retain=outputs["retain"].entropy,
        test=outputs["test"].entropy,
        forget=outputs["forget"].entropy,
    )


def _attacks(outputs: dict[str, Outputs]) -> dict[str, Attack]:
    return {
        "confidence_svc": confidence_svc(outputs),
        "loss_regression": loss_regression(outputs),
        **thresholds(outputs),
        "rmia": rmia(outputs, []),
    }


def _require_same_data(gold: Evaluation, sets: Mapping[str, Samples]) -> None:
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
            _with_rmia(one, golds[:i] + golds[i + 1 :]) if len(golds) > 1 else one
            for i, one in enumerate(golds)
        ]
    figures = [one.figures() for one in golds]
    spread = spreads(figures)
    gaps = {
        name: figure - spread[name].mean
        for name, figure in result.figures().items()
        if name in spread
    }
    logits = [one.outputs["forget"].logits for one in (result, *golds) if "forget" in one.outputs]
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


def _with_rmia(one: Evaluation, references: list[Evaluation]) -> Evaluation:
    found = rmia(one.outputs, [other.outputs for other in references])
    return replace(one, attacks={**one.attacks, "rmia": found})


def _require_same_samples(gold: Evaluation, result: Evaluation) -> None:
    for name, scores in result.sets.items():
        ours = {label: one.count for label, one in scores.per_class.items()}
        theirs = {label: one.count for label, one in gold.sets[name].per_class.items()}
        if ours != theirs:
            raise ValueError(
                f"the gold Evaluation is of another {name} set: samples by class {theirs}, here "
                f"{ours}; pass the gold model itself"
            )


def _by_class(scores: SetScore, most: int = 20) -> str:
    """The accuracy of each class; of many classes the lowest ones."""
    shown = list(scores.per_class.items())
    if len(shown) > most:
        shown = sorted(shown, key=lambda item: item[1].accuracy)[:most]
    text = ", ".join(f"{label}: {one.accuracy:.1f}" for label, one in shown)
    left = len(scores.per_class) - len(shown)
    return text + (f" (and {left} classes that are no lower)" if left else "")
