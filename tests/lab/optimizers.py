"""The optimizers that the guard is tested with: one row each, made on a model's parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import timm.optim
from timm.optim import kron
from torch import nn, optim

try:
    import schedulefree
except ImportError:  # an optional package of the tests
    schedulefree = None

Make = Callable[[list[nn.Parameter]], optim.Optimizer]


@dataclass(frozen=True)
class Row:
    name: str
    make: Make
    couples: bool = False  # warns that entries are coupled
    closure: bool = False
    modes: bool = False  # has train() and eval() that write parameters
    matrices: bool = False  # takes 2-D parameters only; AdamW steps the others


def build(row: Row, model: nn.Module) -> list[optim.Optimizer]:
    """The row's optimizer on all parameters, with an AdamW beside it where it takes matrices
    only."""
    parameters = list(model.parameters())
    if not row.matrices:
        return [row.make(parameters)]
    rest = [p for p in parameters if p.ndim != 2]
    return [row.make([p for p in parameters if p.ndim == 2]), optim.AdamW(rest, lr=1e-2)]


def _torch(name: str, make: Callable[..., optim.Optimizer], **options: object) -> Row:
    flags = {
        key: bool(options.pop(key)) for key in ("couples", "closure", "matrices") if key in options
    }
    return Row(name, lambda ps: make(ps, **options), **flags)


def _timm(name: str, couples: bool = False, lr: float = 1e-2, decay: float = 1e-2) -> Row:
    def make(parameters: list[nn.Parameter]) -> optim.Optimizer:
        return timm.optim.create_optimizer_v2(parameters, opt=name, lr=lr, weight_decay=decay)

    return Row(f"timm {name}", make, couples=couples)


def _kron(parameters: list[nn.Parameter]) -> optim.Optimizer:
    # Uncompiled: 38 s of inductor otherwise. It warns where opt_einsum is not installed.
    with mock.patch.object(kron, "has_dynamo", False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kron.Kron(parameters, lr=1e-2, weight_decay=1e-2)


OPTIMIZERS = [
    _torch("SGD", optim.SGD, lr=1e-1),
    _torch("SGD momentum", optim.SGD, lr=1e-1, momentum=0.9),
    _torch("SGD momentum decay", optim.SGD, lr=1e-1, momentum=0.9, weight_decay=1e-2),
    _torch("SGD foreach", optim.SGD, lr=1e-1, momentum=0.9, weight_decay=1e-2, foreach=True),
    _torch("SGD fused", optim.SGD, lr=1e-1, momentum=0.9, weight_decay=1e-2, fused=True),
    _torch("SGD nesterov", optim.SGD, lr=1e-1, momentum=0.9, nesterov=True),
    _torch("SGD closure", optim.SGD, lr=1e-1, momentum=0.9, closure=True),
    _torch("Adam", optim.Adam, lr=1e-2),
    _torch("Adam decay", optim.Adam, lr=1e-2, weight_decay=1e-2),
    _torch("Adam amsgrad", optim.Adam, lr=1e-2, amsgrad=True),
    _torch("AdamW", optim.AdamW, lr=1e-2),
    _torch("AdamW foreach", optim.AdamW, lr=1e-2, foreach=True),
    _torch("AdamW fused", optim.AdamW, lr=1e-2, fused=True),
    _torch("NAdam", optim.NAdam, lr=1e-2, weight_decay=1e-2),
    _torch("RAdam", optim.RAdam, lr=1e-2, weight_decay=1e-2),
    _torch("RMSprop", optim.RMSprop, lr=1e-2, momentum=0.9, centered=True),
    _torch("Adagrad", optim.Adagrad, lr=1e-2),
    _torch("Adadelta", optim.Adadelta, lr=1.0),
    _torch("Adamax", optim.Adamax, lr=1e-2),
    _torch("ASGD", optim.ASGD, lr=1e-2),
    _torch("Rprop", optim.Rprop, lr=1e-2),
    _torch("LBFGS", optim.LBFGS, lr=1e-1, max_iter=3, closure=True),
    _torch("Adafactor", optim.Adafactor, lr=1e-2, couples=True),
    _torch("Muon", optim.Muon, lr=1e-2, couples=True, matrices=True)
    if hasattr(optim, "Muon")  # torch 2.9
    else None,
    _timm("lamb", couples=True),
    _timm("lars", couples=True),
    _timm("lion"),
    _timm("adafactor", couples=True),
    _timm("adafactorbv", couples=True),
    _timm("adamp", couples=True),
    _timm("sgdp", couples=True),
    _timm("adan"),
    _timm("adopt"),
    _timm("laprop"),
    _timm("madgrad"),
    _timm("mars", couples=True),
    _timm("nadamw"),
    _timm("novograd", couples=True),
    Row("timm kron", _kron, couples=True),
    _timm("muon", couples=True),
    _timm("cadamw", couples=True),
    _timm("lookahead_adamw"),
    _timm("lookahead_sgd", lr=1e-1),
]
OPTIMIZERS = [row for row in OPTIMIZERS if row is not None]
if schedulefree is not None:
    OPTIMIZERS += [
        Row(name, lambda ps, make=make: make(ps, lr=1e-2, weight_decay=1e-2), modes=True)
        for name, make in (
            ("schedule-free AdamW", schedulefree.AdamWScheduleFree),
            ("schedule-free SGD", schedulefree.SGDScheduleFree),
            ("schedule-free RAdam", schedulefree.RAdamScheduleFree),
        )
    ]
