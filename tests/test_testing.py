"""check_method finds every broken promise: one deliberately broken method for each check."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deepclean_hooks import testing
from deepclean_hooks.measure.batch_mean import BatchMean
from deepclean_hooks.measure.estimator import Estimator
from deepclean_hooks.measure.fisher import PerSampleFisher
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.measure.request import Request
from deepclean_hooks.methods import DeepClean, FineTune, Mask, Selection
from deepclean_hooks.methods.term import Term

pytestmark = pytest.mark.filterwarnings("ignore:.* of the reset entries are dead:UserWarning")


@dataclass(frozen=True)
class Honest(DeepClean):
    """What the broken ones are made of."""

    gamma: float = 1.1
    name = "honest"


def test_the_honest_method_passes() -> None:
    """Fails if a check finds fault with a method that has none."""
    testing.check_method(Honest())


@dataclass(frozen=True)
class Settings(Honest):
    """Settings that no report can hold."""

    def settings(self) -> dict[str, object]:
        return {"gamma": torch.tensor(1.1)}


class _Tracing(PerSampleFisher):
    """Measures, and leaves something behind."""

    def __init__(self, leave: Callable[[nn.Module], object]) -> None:
        object.__setattr__(self, "leave", leave)

    def __repr__(self) -> str:
        return "_Tracing()"

    def __call__(self, request: Request) -> Measurement:
        found = super().__call__(request)
        self.leave(request.model)
        return found


@dataclass(frozen=True)
class Tracing(Honest):
    """A method whose estimator leaves a trace; which one is the row's."""

    leave: Callable[[nn.Module], object] = print

    @property
    def measured_by(self) -> Estimator:
        return _Tracing(self.leave)


@dataclass(frozen=True)
class SelectSpoils(Honest):
    """Scales the measurement in place."""

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        for total in forget.sums.values():
            total.mul_(2)
        return super().select(forget, retain)


calls = iter(range(10**6))


@dataclass(frozen=True)
class SelectDraws(Honest):
    """Selects otherwise every time."""

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        found = super().select(forget, retain)
        first = next(iter(found.masks))
        masks = {**found.masks, first: found.masks[first].clone()}
        masks[first].view(-1)[2] = next(calls) % 2 == 0
        return replace(found, masks=masks)


@dataclass(frozen=True)
class MasksOfBytes(Honest):
    """Masks that are no masks."""

    def select(self, forget: Measurement, retain: Measurement) -> Selection:
        found = super().select(forget, retain)
        return replace(found, masks={n: m.to(torch.uint8) for n, m in found.masks.items()})


@dataclass(frozen=True)
class ValuesWrite(Honest):
    """Writes the weights itself."""

    def new_values(
        self, weights: Mapping[str, Tensor], selection: Selection, *measured: Measurement
    ) -> dict[str, Tensor]:
        for name, mask in selection.masks.items():
            weights[name].masked_fill_(mask, 0)
        return dict(weights)


@dataclass(frozen=True)
class ValuesDraw(Honest):
    """Draws from the global random state."""

    def new_values(
        self, weights: Mapping[str, Tensor], selection: Selection, *measured: Measurement
    ) -> dict[str, Tensor]:
        return {name: torch.randn_like(weights[name]) for name in selection.masks}


@dataclass(frozen=True)
class Writes(Honest):
    """Writes a bias that it did not select, when values are asked for."""

    def values(
        self, model: nn.Module, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        model.head.bias.data[2] += 1
        return super().values(model, selection, forget, retain)


@dataclass(frozen=True)
class FreesMore(Honest):
    """Lets the guard free everything, and says the selection is free."""

    def free(self, selection: Selection) -> Mask:
        if next(calls) % 2 == 0:
            return {n: torch.ones_like(m) for n, m in selection.masks.items()}
        return selection.masks


@dataclass(frozen=True)
class DependsOnBatches(Honest):
    """Squares the gradient of whatever batches the loader has."""

    @property
    def measured_by(self) -> Estimator:
        return _LoaderBatches()


class _LoaderBatches(Estimator):
    """Batch means over the loader's own batches."""

    def __call__(self, request: Request) -> Measurement:
        found = BatchMean(request.data.batch_size)(request)
        found.settings["estimator"] = "loader batches"
        return found


@dataclass(frozen=True)
class LeavesHook(Honest):
    """Hangs a hook on the model when values are asked for, which nobody takes off."""

    def values(
        self, model: nn.Module, selection: Selection, forget: Measurement, retain: Measurement
    ) -> dict[str, Tensor]:
        model.register_forward_hook(lambda *args: None)
        return super().values(model, selection, forget, retain)


@dataclass(frozen=True)
class Nameless(Honest):
    """Another name every time it is asked."""

    @property
    def name(self) -> str:
        return f"method {next(calls)}"


@dataclass(frozen=True)
class Restless(FineTune):
    """Frees at random."""

    name = "restless"

    def free(self, selection: Selection) -> Mask:
        return {n: torch.rand(m.shape) > 0.5 for n, m in selection.masks.items()}


class Changing(Term):
    """Adds another gradient each time, or draws from the loop's random state."""

    draws = False

    def __init__(self, change: Callable[[], float]) -> None:
        self.change = change

    def adjust(self, stepped: Mapping[str, Tensor], step: int) -> None:
        for tensor in stepped.values():
            tensor.grad += self.change()


@dataclass(frozen=True)
class Unsteady(Honest):
    """Has a term that changes; how is the row's."""

    change: Callable[[], float] = float

    def term(self) -> Term:
        return Changing(self.change)


@dataclass(frozen=True)
class Forgetful(Honest):
    """Has another setting each time, so that a stored run is never its own."""

    name = "forgetful"

    def settings(self) -> dict[str, object]:
        return {"gamma": self.gamma, "call": next(calls)}


def statistics_move(model: nn.Module) -> None:
    model.norm.running_mean.add_(1)


def gradient_stays(model: nn.Module) -> None:
    model.head.bias.grad = torch.ones_like(model.head.bias)


BROKEN = {
    "settings": (Settings(), testing.check_settings),
    "trace, a mode": (
        Tracing(leave=lambda model: model.norm.train()),
        testing.check_measuring_leaves_no_trace,
    ),
    "trace, a buffer": (
        Tracing(leave=statistics_move),
        testing.check_measuring_leaves_no_trace,
    ),
    "trace, a gradient": (
        Tracing(leave=gradient_stays),
        testing.check_measuring_leaves_no_trace,
    ),
    "trace, random state": (
        Tracing(leave=lambda model: torch.rand(1)),
        testing.check_measuring_leaves_no_trace,
    ),
    "trace, requires_grad": (
        Tracing(leave=lambda model: model.head.requires_grad_(False)),
        testing.check_measuring_leaves_no_trace,
    ),
    "select spoils": (SelectSpoils(), testing.check_select_is_pure),
    "select draws": (SelectDraws(), testing.check_select_is_pure),
    "masks of bytes": (MasksOfBytes(), testing.check_select_is_pure),
    "values write": (ValuesWrite(), testing.check_new_values_are_pure),
    "values draw": (ValuesDraw(), testing.check_new_values_are_pure),
    "changes more": (Writes(), testing.check_only_the_selection_changes),
    "frees more": (FreesMore(), testing.check_frozen_entries_are_held),
    "batches": (DependsOnBatches(), testing.check_batches_do_not_matter),
    "a hook": (LeavesHook(), testing.check_an_exception_leaves_no_hook),
    "no name": (Nameless(), testing.check_report_is_json),
    "two runs": (Restless(), testing.check_two_runs_are_the_same),
    "resume": (Forgetful(), testing.check_a_run_resumes),
    "a closure": (Unsteady(change=lambda: float(next(calls))), testing.check_a_closure_is_a_loop),
    "random state": (
        Unsteady(change=lambda: float(torch.rand(()))),
        testing.check_the_random_state_is_the_loops,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_found(name: str) -> None:
    """Fails if a check lets the promise pass that it is named for."""
    method, check = BROKEN[name]
    # The session itself refuses a stored run whose settings differ.
    with pytest.raises(ValueError if name == "resume" else AssertionError):
        check(method)


def test_every_check_has_a_broken_method() -> None:
    """Fails if a check is added that was never seen to fail."""
    assert {check for _, check in BROKEN.values()} == set(testing.CHECKS)


def test_the_error_names_method_and_check() -> None:
    """Fails if a person cannot tell from the error which promise is broken."""
    with pytest.raises(AssertionError, match="honest: check_select_is_pure: select changed a"):
        testing.check_method(SelectSpoils())


def test_the_documented_method_passes() -> None:
    """Fails if the example of docs/methods.md does not run as it stands."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    (code,) = [block for block in blocks if "check_method(" in block]
    exec(compile(code, "docs/methods.md", "exec", dont_inherit=True), {"__name__": "example"})
