"""Published settings: every one runs as it stands, and says where its numbers are from.

Run as a script this writes their table into docs/methods.md.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import deepclean_hooks as deepclean
from deepclean_hooks import options
from deepclean_hooks.methods import DeepClean, FineTune, Method
from deepclean_hooks.methods.baselines.published import PUBLISHED, Setting

PAGE = Path(__file__).resolve().parents[3] / "docs" / "methods.md"
HEAD = "| setting | method | training | source | differs |\n| --- | --- | --- | --- | --- |\n"


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_those_of_unlearn(name: str) -> None:
    """Fails if a setting has an argument that unlearn() lacks, or an optimizer that cannot be
    made of parameters."""
    setting = PUBLISHED[name]
    assert isinstance(setting.method, Method)
    assert setting.source
    known = {*inspect.signature(deepclean.unlearn).parameters, *options.NAMES}
    assert setting.training.keys() <= known - {"model", "forget", "retain", "method"}
    if "optimizer" in setting.training:
        made = setting.training["optimizer"]([torch.nn.Parameter(torch.zeros(2))])
        assert isinstance(made, torch.optim.Optimizer)
    trains = setting.method.own_training or isinstance(setting.method, FineTune | DeepClean)
    assert not trains or setting.training["epochs"] >= 1


def test_the_documentation_has_every_setting_as_it_is() -> None:
    """Fails if a setting is added, renamed, removed or changed and docs/methods.md is not: run this
    file as a script."""
    assert table() == printed(), f"python {Path(__file__).name} writes the table anew"


def test_no_docstring_repeats_a_setting() -> None:
    """Fails if the optimizer of a published setting stands in a method's docstring too, where it
    would go its own way."""
    for setting in PUBLISHED.values():
        text = type(setting.method).__doc__ or ""
        if type(setting.method) is not deepclean.Retrain:  # says how DeepClean's networks are made
            assert "momentum 0.9" not in text, type(setting.method).__name__


def test_the_tables_of_one_method_differ() -> None:
    """Fails if the DeepClean tables' row of bad teaching is the authors' own, a tenth of it."""
    theirs, tables = PUBLISHED["bad teaching"], PUBLISHED["bad teaching/deepclean"]
    assert tables.training["epochs"] == 10 * theirs.training["epochs"]
    assert tables.training["lr"] == pytest.approx(
        10 * theirs.training["optimizer"].keywords["lr"], rel=1e-12
    )


def table() -> str:
    """The settings as they stand in docs/methods.md."""
    return HEAD + "".join(
        f'| `PUBLISHED["{name}"]` | `{_method(setting.method)}` | {_training(setting)} '
        f"| {setting.source} | {setting.differs} |\n"
        for name, setting in PUBLISHED.items()
    )


def printed() -> str:
    """The table in docs/methods.md."""
    text = PAGE.read_text(encoding="utf-8")
    return HEAD + text.split(HEAD)[1].split("\n\n")[0].rstrip("\n") + "\n"


def _method(method: Method) -> str:
    """The call that makes it: what differs from the defaults, and the numbers."""
    given = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.init and field.name != "seed" and (number or value != _default(field)):
            given.append(f"{field.name}={value!r}")
    return f"{type(method).__name__}({', '.join(given)})"


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _training(setting: Setting) -> str:
    options = dict(setting.training)
    if not options:
        return "none"
    parts = [f"Adam {options['lr']:g}"] if "lr" in options else []
    if "optimizer" in options:
        made = options["optimizer"]
        named = {"momentum": "momentum", "weight_decay": "decay"}
        more = [f"{named[k]} {v:g}" for k, v in made.keywords.items() if k in named]
        parts = [", ".join([f"{made.func.__name__} {made.keywords['lr']:g}", *more])]
    parts.append(f"{options['epochs']} epoch{'s' if options['epochs'] > 1 else ''}")
    if "batch_size" in options:
        parts.append(f"batch {options['batch_size']}")
    return "; ".join(parts)


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(printed(), table()), encoding="utf-8")
