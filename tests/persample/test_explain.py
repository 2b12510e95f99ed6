"""`explain` says which rule serves each parameter, and no ordinary network needs the loop."""

import pytest

from deepclean_hooks import explain
from lab.cases import CASES, Custom


@pytest.mark.parametrize(
    "name", [n for n in CASES if n.startswith(("torchvision", "timm", "transformers"))]
)
def test_no_architecture_needs_the_loop(name: str) -> None:
    """Fails if a parameter of a known architecture falls to the one-sample loop."""
    case = CASES[name]
    told = explain(case.model(), case.batch(3))
    assert told.looped() == {}
    assert {p.way for p in told.parameters} <= {"fast", "pulled", "unused"}


def test_ways_are_told_apart() -> None:
    """Fails if tied weights pass for fast, or a fast parameter for pulled."""
    case = CASES["tied, repeated, raw"]
    ways = {p.name: p for p in explain(case.model(), case.batch(3)).parameters}
    assert ways["stem.weight"].way == "fast"
    assert ways["up.weight"].way == "pulled"
    assert ways["up.weight"].rules == ("Linear", "Linear")
    assert ways["up.weight"].bytes_per_sample == 16 * 8 * 4
    unused = CASES["unused, frozen, in place"]
    ways = {p.name: p for p in explain(unused.model(), unused.batch(3)).parameters}
    assert ways["unused.weight"].way == "unused"
    assert "frozen.weight" not in ways


def test_the_loop_has_a_reason() -> None:
    """Fails if a looped parameter is not named with why, in the text too."""
    told = explain(Custom(), CASES["custom function"].batch(3))
    assert "not intercepted" in told.looped()["weight"]
    assert "1 loop" in str(told)
