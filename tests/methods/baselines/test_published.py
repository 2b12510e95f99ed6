"""Published settings: every one runs as it stands, and says where its numbers are from."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import deepclean_hooks as deepclean
from deepclean_hooks.methods import DeepClean, FineTune, Method
from deepclean_hooks.methods.baselines.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_those_of_unlearn(name: str) -> None:
    """Fails if a setting has an argument that unlearn() lacks, or an optimizer that cannot be
    made of parameters."""
    setting = PUBLISHED[name]
    assert isinstance(setting.method, Method)
    assert setting.source
    known = inspect.signature(deepclean.unlearn).parameters
    assert setting.training.keys() <= known.keys() - {"model", "forget", "retain", "method"}
    if "optimizer" in setting.training:
        made = setting.training["optimizer"]([torch.nn.Parameter(torch.zeros(2))])
        assert isinstance(made, torch.optim.Optimizer)
    trains = setting.method.own_training or isinstance(setting.method, FineTune | DeepClean)
    assert not trains or setting.training["epochs"] >= 1


def test_every_setting_is_in_the_documentation() -> None:
    """Fails if a setting is added, renamed or removed and docs/methods.md is not."""
    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    found = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `PUBLISHED")}
    assert found == {f'PUBLISHED["{name}"]' for name in PUBLISHED}


def test_the_tables_of_one_method_differ() -> None:
    """Fails if the DeepClean tables' row of bad teaching is the authors' own, a tenth of it."""
    theirs, tables = PUBLISHED["bad teaching"], PUBLISHED["bad teaching/deepclean"]
    assert tables.training["epochs"] == 10 * theirs.training["epochs"]
    assert tables.training["lr"] == pytest.approx(
        10 * theirs.training["optimizer"].keywords["lr"], rel=1e-12
    )
