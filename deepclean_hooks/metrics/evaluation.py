"""What an evaluation says of one model: its figures, and their gaps to gold models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deepclean_hooks.metrics.attack import Attack
from deepclean_hooks.metrics.distance import ZRF, Measured
from deepclean_hooks.metrics.gold import AVERAGE_GAP, Spread
from deepclean_hooks.metrics.histogram import EDGES
from deepclean_hooks.metrics.outputs import Outputs
from deepclean_hooks.metrics.probe import MEANING as PROBE

NO_GOLD = "it needs a gold model: pass gold="
NO_UNTRAINED = "it needs an untrained model: pass untrained="
NOT_ASKED = "not asked for (membership=False)"
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
    """The figures of one model, by set name, and those of the gold models, if any were given.

    `attacks` by name, that of DeepClean and SSD as `entropy_regression`; `distances` are to the
    gold models. `gaps`: this model's figures minus the mean of the gold models' (`golds`, of which
    `gold` is the first); `spread`: each figure among the gold models.
    `seconds` is the wall-clock time spent on this model. `outputs` holds the outputs by sample, to
    compute more figures from, and is not part of `to_dict`.
    """

    sets: dict[str, SetScore]
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
        `forget.3.accuracy` (class 3), `attack.loss_regression.accuracy`, `probe`, `zrf`."""
        named: dict[str, float] = {}
        for name, scores in self.sets.items():
            named[f"{name}.accuracy"], named[f"{name}.loss"] = scores.accuracy, scores.loss
            named[f"{name}.calibration_error"] = scores.calibration_error
            for label, of_class in scores.per_class.items():
                named[f"{name}.{label}.accuracy"] = of_class.accuracy
                named[f"{name}.{label}.loss"] = of_class.loss
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
        return {name: within for name, within in held.items() if within is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, the same after a round trip through JSON."""
        return {
            "sets": {
                name: {
                    **vars(scores),
                    "per_class": {str(c): dict(vars(of)) for c, of in scores.per_class.items()},
                }
                for name, scores in self.sets.items()
            },
            "figures": self.figures(),
            "attacks": {name: attack.to_dict() for name, attack in self.attacks.items()},
            "distances": {name: dict(vars(far)) for name, far in self.distances.items()},
            "probe": dict(vars(self.probe)),
            "zrf": dict(vars(self.zrf)),
            "average_gap": dict(vars(self.average_gap)),
            "histograms": {name: dict(counts) for name, counts in self.histograms.items()},
            "edges": {name: list(edges) for name, edges in EDGES.items()},
            "seconds": self.seconds,
            "gaps": dict(self.gaps),
            "spread": {name: dict(vars(among)) for name, among in self.spread.items()},
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
        lines += [self._attack_line(name, attack) for name, attack in self.attacks.items()]
        if not self.attacks:
            lines.append(f"membership inference: not computed: {NOT_ASKED}")
        measured = {
            **self.distances,
            "probe": self.probe,
            "zrf": self.zrf,
            "average gap": self.average_gap,
        }
        lines += [self._measured_line(name, figure) for name, figure in measured.items()]
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

    def _attack_line(self, name: str, attack: Attack) -> str:
        words = [
            f"{figure} {self._with_gap(f'attack.{name}.{figure}', f'{value:.3f}', '.3f')}"
            for figure, value in attack.figures.items()
        ]
        words += [f"{figure} not computed: {why}" for figure, why in attack.reasons.items()]
        return f"attack {name}: {'; '.join(words)}"

    def _measured_line(self, name: str, figure: Measured) -> str:
        if figure.value is None:
            return f"{name}: not computed: {figure.reason}"
        floor = figure.gold_to_gold
        among = "" if floor is None else f" (between gold models {floor:.4f})"
        return f"{name}: {self._with_gap(name, f'{figure.value:.4f}', '.4f')}{among}"


def _by_class(scores: SetScore, most: int = 20) -> str:
    """The accuracy of each class; of many classes the lowest ones."""
    shown = list(scores.per_class.items())
    if len(shown) > most:
        shown = sorted(shown, key=lambda item: item[1].accuracy)[:most]
    text = ", ".join(f"{label}: {of_class.accuracy:.1f}" for label, of_class in shown)
    left = len(scores.per_class) - len(shown)
    return text + (f" (and {left} classes that are no lower)" if left else "")
