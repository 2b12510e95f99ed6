"""What a model knows of the forget, retain and test sets, and the gap of each figure to a gold
model.

N: samples of a set, C: classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepclean_hooks import losses, measure, ranks
from deepclean_hooks.batches import Batch
from deepclean_hooks.measure import Data, Samples
from deepclean_hooks.membership import Membership, entropy_attack


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
    """

    count: int
    accuracy: float
    loss: float
    per_class: dict[int, ClassScore]


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model, by set name, and the same of the gold model if one was given.

    `seconds` is the wall-clock time spent on this model; the gold model's is in `gold`.
    """

    sets: dict[str, SetScore]
    membership: Membership
    seconds: float
    gold: Evaluation | None = None
    gaps: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Every figure by name: `forget.accuracy`, `forget.loss`, `forget.3.accuracy` (class 3),
        `membership.rate`."""
        named: dict[str, float] = {}
        for name, scores in self.sets.items():
            named[f"{name}.accuracy"], named[f"{name}.loss"] = scores.accuracy, scores.loss
            for label, one in scores.per_class.items():
                named[f"{name}.{label}.accuracy"] = one.accuracy
                named[f"{name}.{label}.loss"] = one.loss
        if self.membership.rate is not None:
            named["membership.rate"] = self.membership.rate
        return named

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
            "seconds": self.seconds,
            "gaps": dict(self.gaps),
            "gold": None if self.gold is None else self.gold.to_dict(),
        }

    def __str__(self) -> str:
        """The figures as a table, each with its gap to the gold model."""
        head = f"{'':12}{'samples':>9}{'accuracy %':>20}{'loss':>22}"
        lines = [head + ("    (in brackets: minus gold)" if self.gaps else "")]
        for name, scores in self.sets.items():
            accuracy = self._with_gap(f"{name}.accuracy", f"{scores.accuracy:.2f}", ".2f")
            loss = self._with_gap(f"{name}.loss", f"{scores.loss:.4f}", ".4f")
            lines.append(f"{name:12}{scores.count:>9}{accuracy:>20}{loss:>22}")
        for name, scores in self.sets.items():
            lines.append(f"{name} by class, accuracy %: {_by_class(scores)}")
        lines.append(self._membership_line())
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


def evaluate(
    model: nn.Module,
    *,
    forget: Data | Samples | None = None,
    retain: Data | Samples | None = None,
    test: Data | Samples | None = None,
    forget_test: Data | Samples | None = None,
    gold: nn.Module | Evaluation | None = None,
    batch_size: int | None = None,
    collate_fn: Any = None,
    membership: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Accuracy, loss and membership inference of a model on the sets given, each sample once over
    all ranks.

    `forget_test` is the part of the test data that resembles the forget set (a forgotten class,
    say); membership inference needs forget, retain and test. `gold` is a model trained without the
    forget set, or its Evaluation on the same sets. The model runs in eval mode, without autocast,
    half-precision weights as float32, and is left as it was. Raises ValueError for no or an empty
    set, for outputs that are NaN, and for a gold Evaluation of other data.
    """
    given = {"forget": forget, "retain": retain, "test": test, "forget_test": forget_test}
    with ranks.fail_together():
        sets = {
            name: data
            if isinstance(data, Samples)
            else measure.samples(data, name=name, batch_size=batch_size, collate_fn=collate_fn)
            for name, data in given.items()
            if data is not None
        }
    if not sets:
        raise ValueError(f"evaluate needs at least one of {', '.join(given)}; none was given")
    if isinstance(gold, Evaluation):
        _require_same_data(gold, sets)
    result = _evaluate(model, sets, membership)
    if gold is None:
        return result
    if isinstance(gold, nn.Module):
        gold = _evaluate(gold, sets, membership)
    return _against(gold, result)


@dataclass(frozen=True)
class _Outputs:
    """What is kept of a model's outputs on a set; every tensor is (N,) and on the CPU."""

    labels: Tensor  # int64
    correct: Tensor  # bool
    loss: Tensor  # float64
    entropy: Tensor  # float64


def _evaluate(model: nn.Module, sets: Mapping[str, Samples], attacked: bool) -> Evaluation:
    start = time.perf_counter()
    outputs = {name: _outputs(model, source, name) for name, source in sets.items()}
    scores = {name: _score(one) for name, one in outputs.items()}
    found = _membership(outputs, attacked)
    return Evaluation(scores, found, time.perf_counter() - start)


def _outputs(model: nn.Module, source: Samples, name: str, progress: bool) -> _Outputs:
    rows: list[Tensor] = []
    label = f"evaluate: {name}" if progress else None
    with measure.no_trace(model) as inner, measure.float32_weights(inner) as dtype:
        device = measure.device_of(inner)
        with ranks.fail_together():
            for batch in measure.walk(
                source, device=device, dtype=dtype, name=name, progress=label
            ):
                with torch.no_grad():
                    rows.append(_rows(inner, batch, name))
    mine = torch.cat(rows) if rows else torch.empty(0, 4, dtype=torch.float64)
    table = _in_index_order(ranks.gather(mine))
    if not len(table):
        raise ValueError(f"{name} is empty: its loader gave 0 samples")
    labels, correct, loss, entropy = table.unbind(1)
    return _Outputs(labels.long(), correct.bool(), loss, entropy)


def _rows(model: nn.Module, batch: Batch, name: str) -> Tensor:
    """Label, correctness, loss and entropy of each sample, (N, 4) in float64 on the CPU."""
    logits, labels = losses.logits_and_labels(model, batch)
    # On the CPU because not every accelerator has float64; it holds labels exactly up to 2^53.
    logits, labels = logits.to("cpu").double(), labels.to("cpu")
    log_p = torch.log_softmax(logits, dim=1)  # (N, C)
    loss = -log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    entropy = torch.special.entr(log_p.exp()).sum(dim=1)
    bad = torch.isnan(log_p).any(dim=1)
    if bad.any():
        raise ValueError(
            f"the model's output for sample {int(bad.nonzero()[0])} of a batch of {name} is NaN or "
            "infinite; check the model's weights and the input for NaN or infinity"
        )
    return torch.stack([labels.double(), (logits.argmax(1) == labels).double(), loss, entropy], 1)


def _in_index_order(parts: list[Tensor]) -> Tensor:
    # Rank r walked the samples r, r + world, ...: put back, sums do not depend on the ranks.
    whole = torch.empty(sum(len(part) for part in parts), 4, dtype=torch.float64)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def _score(outputs: _Outputs) -> SetScore:
    per_class = {}
    for label in sorted(set(outputs.labels.tolist())):
        among = outputs.labels == label
        count, right = int(among.sum()), int(outputs.correct[among].sum())
        per_class[label] = ClassScore(count, 100 * right / count, float(outputs.loss[among].mean()))
    count, right = len(outputs.labels), int(outputs.correct.sum())
    return SetScore(count, 100 * right / count, float(outputs.loss.mean()), per_class)


def _membership(outputs: Mapping[str, _Outputs], asked: bool) -> Membership:
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


def _require_same_data(gold: Evaluation, sets: Mapping[str, Samples]) -> None:
    missing = [name for name in sets if name not in gold.sets]
    if missing:
        raise ValueError(
            f"the gold Evaluation has no figures for {', '.join(missing)}; evaluate gold on the "
            "same sets, or pass the gold model itself"
        )


def _against(gold: Evaluation, result: Evaluation) -> Evaluation:
    for name, scores in result.sets.items():
        ours = {label: one.count for label, one in scores.per_class.items()}
        theirs = {label: one.count for label, one in gold.sets[name].per_class.items()}
        if ours != theirs:
            raise ValueError(
                f"the gold Evaluation is of another {name} set: samples by class {theirs}, here "
                f"{ours}; pass the gold model itself"
            )
    reference = gold.figures()
    gaps = {
        name: figure - reference[name]
        for name, figure in result.figures().items()
        if name in reference
    }
    return Evaluation(result.sets, result.membership, result.seconds, gold, gaps)


def _by_class(scores: SetScore, most: int = 20) -> str:
    """The accuracy of each class; of many classes the lowest ones."""
    shown = list(scores.per_class.items())
    if len(shown) > most:
        shown = sorted(shown, key=lambda item: item[1].accuracy)[:most]
    text = ", ".join(f"{label}: {one.accuracy:.1f}" for label, one in shown)
    left = len(scores.per_class) - len(shown)
    return text + (f" (and {left} classes that are no lower)" if left else "")
