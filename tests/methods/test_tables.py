"""A new method is one file and one row: each table over methods has a row for every one."""

from __future__ import annotations

from pathlib import Path

import pytest

import deepclean_hooks as deepclean
from deepclean_hooks.methods.baselines.published import PUBLISHED
from lab.methods import METHODS, every_method

ROOT = Path(__file__).resolve().parents[2]
# Not published with settings of an experiment that could be repeated.
WITHOUT_SETTING = {"ASSD", "NegGradPlus", "ReferenceGuided"}


def test_a_subclass_that_is_not_exported_is_seen() -> None:
    """Fails if a method is written and not named in `deepclean_hooks.methods.__all__`."""
    seen, waiting = set(), [deepclean.Method]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("deepclean_hooks.") and "name" in vars(kind):
            seen.add(kind.__name__)
    assert seen == set(every_method())


def test_every_method_is_public() -> None:
    """Fails if a method cannot be taken from the package itself."""
    assert set(every_method()) <= set(deepclean.__all__)


def test_every_method_is_checked() -> None:
    """Fails if no row has a method go through `check_method` and the tests of the loops."""
    assert {type(method).__name__ for method in METHODS.values()} == set(every_method())


def test_every_method_has_a_published_setting() -> None:
    """Fails if how its authors train a method is nowhere, or an exemption is out of date."""
    published = {type(setting.method).__name__ for setting in PUBLISHED.values()}
    assert published == set(every_method()) - WITHOUT_SETTING


@pytest.mark.parametrize("page", ["methods.md", "api.md"])
def test_every_method_is_documented(page: str) -> None:
    """Fails if the table of methods or the reference lacks one."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    mark = "`{}(" if page == "methods.md" else ".{}\n"
    assert [name for name in every_method() if mark.format(name) not in text] == []


def test_every_report_says_what_became_of_the_entries() -> None:
    """Fails if a method has no name or two have the same one, or the report cannot say what it
    did to the selected entries."""
    names = [kind.name for kind in every_method().values()]
    assert len(set(names)) == len(names)
    assert all(isinstance(method.effect, str) and method.effect for method in METHODS.values())
