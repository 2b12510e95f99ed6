"""A method from its text is the method that Python makes of it."""

from __future__ import annotations

import pytest

import deepclean_hooks as deepclean
from deepclean_hooks.measure.batch_mean import BatchMean
from deepclean_hooks.methods.named import named
from lab.planted import TEST

TEXTS = {
    "DeepClean": deepclean.DeepClean(),
    "DeepClean()": deepclean.DeepClean(),
    "DeepClean(1.5, parameters=('layer4.*', 'fc.*'))": deepclean.DeepClean(
        1.5, parameters=("layer4.*", "fc.*")
    ),
    "SSD(alpha=5, estimator=BatchMean(batch_size=8))": deepclean.SSD(
        5, estimator=BatchMean(batch_size=8)
    ),
    "NegGradPlus(clip=None, train=DeepClean(gamma=1.1), reset=True)": deepclean.NegGradPlus(
        clip=None, train=deepclean.DeepClean(gamma=1.1), reset=True
    ),
}


@pytest.mark.parametrize(("text", "method"), TEXTS.items(), ids=TEXTS)
def test_text_is_read_as_python_reads_it(text: str, method: deepclean.Method) -> None:
    """Fails if a value, a position or a method within a method is read otherwise."""
    assert named(text) == method


def test_what_a_text_cannot_say_is_provided() -> None:
    """Fails if data are passed to a method that has no use for them, or not to one that has."""
    provided = {"held_out": TEST, "classes": 10}
    assert named("ReferenceGuided(weight=0.7)", provided).held_out is TEST  # type: ignore[attr-defined]
    assert named("DeepClean(gamma='auto')", provided).trial_data is TEST
    assert named("DeepClean", provided).trial_data is None
    assert named("FisherMask", provided) == deepclean.FisherMask(classes=10)
    assert named("FisherMask(7)", provided) == deepclean.FisherMask(classes=7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("DeepClean(gamma=", "write it as in Python"),
        ("2.0", "is no method"),
        ("Deepclean", "close are DeepClean"),
        ("SSD(1, 2, 3, 4, 5, 6)", "its settings are"),
        ("SSD(alpha=1 + x)", "neither a plain value nor a method"),
        ("SSD(alpha=__import__('os').getcwd())", "neither a plain value nor a method"),
        ("ReferenceGuided", "needs held_out"),
    ],
)
def test_anything_else_is_refused(text: str, words: str) -> None:
    """Fails if a text is guessed at, or run."""
    with pytest.raises(ValueError, match=words):
        named(text)
