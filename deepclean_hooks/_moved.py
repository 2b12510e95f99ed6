"""Modules that stood on the flat top of this package before it had rooms: their old names lead to
the new ones, with a DeprecationWarning, until version 0.2."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]

ROOM_OF = {
    **dict.fromkeys(("batches", "samples", "losses"), "data"),
    **dict.fromkeys(("bits", "masks", "tensor_file", "sealed", "checkpoint"), "stored"),
    **dict.fromkeys(("measurement", "expected_fisher", "batch_mean", "dead", "fisher"), "measure"),
    **dict.fromkeys(("held", "compact", "optimizers", "norm_statistics", "follow"), "guard"),
    **dict.fromkeys(("svg", "verify"), "report"),
    "wrappers": "model",
    "shards": "ranks",
    "gamma_auto": "tuning",
}
MOVED = {
    **{name: f"{room}.{name}" for name, room in ROOM_OF.items()},
    "whole": "stored.files",
    "estimators": "measure.estimator",
    "gram": "measure.layer_inputs",
    "overlap": "measure.stored_retain",
    "membership": "metrics.entropy",
    "gamma": "tuning.gamma_sweep",
    "trial": "tuning.copies",
    "identifiers": "report.forgotten",
    "report_html": "report.html",
    "report_rows": "report.rows",
    "report_markdown": "report.markdown",
}


class _Forwarder(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the names in `MOVED`."""
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == PACKAGE and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Lets every attribute be the moved module's."""
        new = f"{PACKAGE}.{MOVED[module.__name__.rpartition('.')[2]]}"
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        found = import_module(new)
        module.__dict__["__getattr__"] = lambda name: getattr(found, name)


def forward() -> None:
    """Makes the old names importable; safe to call twice."""
    if not any(isinstance(finder, _Forwarder) for finder in sys.meta_path):
        sys.meta_path.append(_Forwarder())
