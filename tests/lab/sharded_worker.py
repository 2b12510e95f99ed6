"""What each of the processes of test_sharded.py does: models under FSDP2, measured as they are."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import Dataset, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.measure.fisher import FisherDiagonal
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks import fsdp, shards
from deepclean_hooks.stored import sealed
from lab import cases
from lab import distributed_worker as plain
from lab.hooks import hooks_on

FOLDER = Path()


class Blocks(nn.Module):
    """A small vision transformer of nn.MultiheadAttention: patches, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 12, 3, 3)
        self.token, self.positions = (nn.Parameter(torch.randn(1, n, 12)) for n in (1, 5))
        layer = functools.partial(
            nn.TransformerEncoderLayer, 12, 3, 20, dropout=0.1, batch_first=True
        )
        self.blocks = nn.ModuleList(layer() for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (N, 4, D)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Chosen(nn.Module):
    """The parameter that is used depends on the data: what a rank meets, another may not."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList(torch.randn(5, 36) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = [self.experts[int(row[0] > 0)] for row in x.flatten(1)]
        return torch.cat([F.linear(r[None], w) for r, w in zip(x.flatten(1), chosen, strict=True)])


class Derived(nn.Module):
    """Weight norm, a module called twice, weights that are views: pulled back, summed over uses,
    selected."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(36, 9))
        self.square = nn.Linear(9, 9)
        self.turned, self.out = nn.Parameter(torch.randn(9, 8)), nn.Parameter(torch.randn(9, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).tanh()
        x = self.square(self.square(x).tanh())
        one, other = self.turned.chunk(2, 1)
        x = F.linear(x, one.t()) + F.linear(x, other.t())  # (N, 4)
        return x @ self.out[2:6]


class Looped(nn.Module):
    """An operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(36, 9), nn.Linear(9, 5)
        self.weight = nn.Parameter(torch.randn(9, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(cases.Opaque.apply(self.inner(x.flatten(1)).tanh(), self.weight))


class Checkpointed(nn.Module):
    """Activation checkpointing as Accelerate applies it under FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        self.first, self.head = checkpoint_wrapper(nn.Linear(36, 9)), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.flatten(1)).tanh())


def built(build: Callable[[], nn.Module]) -> Callable[[torch.dtype], nn.Module]:
    """Seeded, in a dtype."""

    def make(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        model = build()
        cases.unsettle(model)
        return model.to(dtype)

    return make


MODELS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "convolutions": plain.network,
    "attention": built(Blocks),
    "chosen": built(Chosen),
    "derived": built(Derived),
    "looped": built(Looped),
    "checkpointed": built(Checkpointed),
}


def layers(model: nn.Module) -> Iterable[nn.Module]:
    """Those that are sharded each by itself: children, and the blocks of lists."""
    for child in model.children():
        yield from layers(child) if isinstance(child, nn.ModuleList) else [child]


def sharded(model: nn.Module, layout: str) -> nn.Module:
    """The model under FSDP2: its root only, layer by layer and the root, and other layouts."""
    options: dict[str, Any] = {}
    if layout == "kept":
        options["reshard_after_forward"] = False
    if layout.startswith("hybrid"):
        shape = (2, 1) if layout == "hybrid 2 x 1" else (1, 2)
        options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    for layer in layers(model) if layout in ("layers", "kept", "no root") else ():
        if any(True for _ in layer.parameters()) and not isinstance(layer, nn.ParameterList):
            fully_shard(layer, **options)
    return model if layout == "no root" else fully_shard(model, **options)


TABLE = [
    *((name, layout, 13, torch.float64) for name in MODELS for layout in ("root", "layers")),
    *(("convolutions", "layers", count, torch.float64) for count in (37, 1)),
    *(("attention", "layers", count, torch.float32) for count in (37, 1)),
    *(("attention", "root", count, torch.float64) for count in (37,)),
    *(("attention", layout, 13, torch.float64) for layout in ("kept", "no root")),
    *(("convolutions", layout, 13, torch.float64) for layout in ("hybrid 2 x 1", "hybrid 1 x 2")),
]


def key(row: tuple[Any, ...]) -> str:
    """A row of the table in words."""
    return " ".join(str(one).removeprefix("torch.") for one in row)


def state(model: nn.Module) -> list[Any]:
    """What measuring must leave as it was."""
    fsdp.reshard(model)
    return [
        [(n, id(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
        [plain.full(p).tolist() for p in model.parameters()],
        [(n, b.tolist()) for n, b in model.named_buffers()],
        [m.training for m in model.modules()],
        hooks_on(model),
        torch.get_rng_state().tolist(),
    ]


def fisher(row: tuple[str, str, int, torch.dtype]) -> dict[str, Any]:
    """The sums of a model of the table, gathered, and what of them lies here."""
    name, layout, count, dtype = row
    model = sharded(MODELS[name](dtype), layout)
    before = state(model)
    found = deepclean.fisher_diagonal(
        model, plain.samples(0, count, dtype), batch_size=4, progress=False
    )
    assert state(model) == before
    return {
        "sums": {n: plain.full(total) for n, total in found.sums.items()},
        "here": sum(shards.local(total).numel() for total in found.sums.values()),
        "alike": all(shards.is_shard(t) == shards.is_shard(p) for t, p in _pairs(model, found)),
        "count": found.count,
        "samples": found.samples,
        "loop": sorted(found.settings["one_sample_loop"]),
    }


def _pairs(model: nn.Module, found: FisherDiagonal) -> list[tuple[Tensor, Tensor]]:
    parameters = fsdp.parameters_of(model)
    return [(total, parameters[name]) for name, total in found.sums.items()]


# ---------------------------------------------------------------------------- sessions


def whole_run(model: nn.Module, rank: int, retain: Any = plain.RETAIN) -> dict[str, Any]:
    """Measured, reset, held, trained and scored; what came of it."""
    inner = unwrap(model)
    then = {name: plain.full(p) for name, p in inner.named_parameters()}
    run = plain.session(model, scores=True).measure(plain.FORGET, retain)
    preview = run.select()
    run.reset()
    stored = run.state_dict()
    run.guard()
    plain.train(model, rank)
    report = run.finish()
    found = plain.outcome(inner, then, run)
    return {
        **found,
        "selected": preview.selected_entries,
        "layers": {one.name: (one.entries, one.selected, one.dead) for one in report.layers},
        "final": {n: plain.full(p) for n, p in inner.named_parameters()},
        "before": report.scores["before"]["sets"],
        "after": report.scores["after"]["sets"],
        "dead": report.dead_fraction,
        "digests": (report.model_before, report.model_after),
        "stored": stored["free"],
        "here": sum(shards.local(mask).numel() for mask in run.free.values()),
    }


def ddp(rank: int) -> dict[str, Any]:
    """The same under DistributedDataParallel."""
    return whole_run(nn.parallel.DistributedDataParallel(plain.network()), rank)


def session(rank: int) -> dict[str, Any]:
    """A session on a sharded model."""
    return whole_run(sharded(plain.network(), "layers"), rank)


def context_manager(rank: int) -> dict[str, Any]:
    """unlearning() on a sharded model."""
    model = sharded(plain.network(), "root")
    then = {name: plain.full(p) for name, p in model.named_parameters()}
    with deepclean.unlearning(
        model, forget=plain.FORGET, retain=plain.RETAIN, method=plain.METHOD, **plain.OPTIONS
    ) as run:
        plain.train(model, rank)
    return plain.outcome(model, then, run)


def resumed_hook(rank: int) -> dict[str, Any]:
    """The hook measures the sharded model on entry; stored after 2 of 4 steps, taken up anew."""
    from accelerate import Accelerator

    class Accelerated(Accelerator):
        is_fsdp2 = True  # on the CPU Accelerate uses DistributedDataParallel, whatever it is told

    def hook(model: nn.Module) -> deepclean.DeepCleanHook:
        sets = {"forget": plain.FORGET, "retain": plain.RETAIN, "method": plain.METHOD}
        return deepclean.DeepCleanHook(Accelerated(cpu=True), model, **sets, **plain.OPTIONS)

    model = sharded(plain.perceptron(), "layers")
    then = {name: plain.full(p) for name, p in model.named_parameters()}
    one, optimizer = hook(model), plain.adamw(model)
    with one as run:
        plain.train(model, rank, 2, optimizer=optimizer)
        stored = copy.deepcopy(sealed.seal(run.state_dict(), model))
        weights = {name: plain.full(value) for name, value in model.state_dict().items()}
        moments = copy.deepcopy(optimizer.state_dict())
        plain.train(model, rank, first=2, optimizer=optimizer)
    again = plain.perceptron()
    again.load_state_dict(weights)
    again = sharded(again, "root")
    other = hook(again)
    other._loaded = stored, Path("deepclean.pt")  # as load_state leaves it
    optimizer = plain.adamw(again)
    optimizer.load_state_dict(moments)
    with other as resumed:
        plain.train(again, rank, first=2, optimizer=optimizer)
    first, found = plain.outcome(model, then, run), plain.outcome(again, then, resumed)
    sharded_masks = all(map(shards.is_shard, resumed.free.values()))
    return {**found, "agree": found["weights"] == first["weights"], "sharded": sharded_masks}


def stored(rank: int) -> dict[str, Any]:
    """A diagonal saved by shards, loaded whole and by shards, and used as `retain`."""
    path = FOLDER / "retain.safetensors"
    made = deepclean.fisher_diagonal(
        sharded(plain.network(), "layers"), plain.RETAIN, batch_size=4, progress=False
    )
    made.save(path)
    model = sharded(plain.network(), "layers")
    cut, full = FisherDiagonal.load(path, like=model), FisherDiagonal.load(path)
    assert not any(map(shards.is_shard, full.sums.values()))
    for name, total in made.sums.items():
        assert torch.equal(shards.local(cut.sums[name]), shards.local(total)), name
        assert torch.equal(full.sums[name], plain.full(total)), name
        here = shards.local(cut.sums[name])
        assert here.untyped_storage().nbytes() == here.numel() * here.element_size(), name
    masks = []
    for retain in (plain.RETAIN, cut, full):
        run = plain.session(sharded(plain.network(), "layers")).measure(plain.FORGET, retain)
        run.select()
        masks.append({n: plain.full(m) for n, m in run.selection.masks.items()})
    difference = cut - deepclean.fisher_diagonal(model, plain.RETAIN, batch_size=3, progress=False)
    left = max(shards.largest(total) for total in difference.sums.values())
    same = all(torch.equal(masks[0][n], other[n]) for other in masks[1:] for n in masks[0])
    return {"same": same, "left": left, "count": difference.count}


def moved_on_one(rank: int) -> None:
    """A frozen entry that only one rank has is written to."""
    model = sharded(plain.perceptron(), "root")
    run = plain.session(model).measure(plain.FORGET, plain.RETAIN)
    run.select()
    run.reset().guard()
    plain.train(model, rank, 1)
    with torch.no_grad():
        for name, p in fsdp.parameters_of(model).items():
            if rank == 1 and name == "1.bias":
                shards.local(p)[0] += 1
    try:
        run.finish()
    finally:
        # Of both ranks: 1 entry moved, though only one of them sees it.
        assert run.report.frozen_entries_moved == 1


def dead(rank: int) -> dict[str, Any]:
    """The literal reading of the paper, which kills channels; counted whole and sharded."""
    method, counts = deepclean.DeepClean(gamma=1.05, one_dimensional=True), []
    for model in (plain.network(), sharded(plain.network(), "layers")):
        run = deepclean.Session(model, method, batch_size=4, **plain.OPTIONS)
        run.measure(plain.FORGET, plain.RETAIN).select()
        run.reset()
        counts.append({one.name: one.dead for one in run.report.layers})
    return {"whole": counts[0], "sharded": counts[1]}


def others(rank: int) -> dict[str, Any]:
    """Other methods that look at entries one by one, and one that counts them on all ranks."""
    found = {}
    for method in (deepclean.SSD(alpha=1.1), deepclean.DeepClean(gamma=1.05, max_selected=0.02)):
        after = []
        for model in (plain.perceptron(), sharded(plain.perceptron(), "layers")):
            run = deepclean.Session(model, method, batch_size=4, **plain.OPTIONS)
            run.measure(plain.FORGET, plain.RETAIN).select()
            run.reset()
            after.append({n: plain.full(p) for n, p in model.named_parameters()})
        one, other = after
        found[method.name] = {
            "off": max(float((one[n] - other[n]).abs().max()) for n in one),
            "selected": run.report.selected_entries,
            "criterion": run.report.criterion,
            "most": run.report.candidate_entries * (getattr(method, "max_selected", None) or 1),
        }
    return found


# ---------------------------------------------------------------------------- errors


def _measure(model: nn.Module, forget: Dataset[Any] = plain.FORGET) -> None:
    plain.session(model).measure(forget, plain.RETAIN)


def bad_label_on_one(rank: int) -> None:
    """Sample 7 falls to rank 1; afterwards the model is as before and can be measured."""
    x, y = plain.FORGET.tensors
    y = y.clone()
    y[7] = 99
    model = sharded(plain.perceptron(), "layers")
    before = state(model)
    try:
        _measure(model, TensorDataset(x, y))
    finally:
        assert state(model) == before
        found = deepclean.fisher_diagonal(model, plain.FORGET, batch_size=4, progress=False)
        assert found.count == 13


def unreadable_on_one(rank: int) -> None:
    """A data set that raises what nobody expects, on one rank."""
    _measure(sharded(plain.perceptron(), "layers"), plain.FailsOnSecondRank(OSError))


def not_finite_on_one(rank: int) -> None:
    """One sample that is infinite: it lies in the second batch of rank 1."""
    x, y = plain.FORGET.tensors
    x = x.clone()
    x[9] = torch.inf
    _measure(sharded(built(Looped)(torch.float32), "layers"), TensorDataset(x, y))


class Kinked(nn.Module):
    """A finite loss whose gradient is not: the square root at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(36, 9, bias=False), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.flatten(1)).abs().sqrt())


def bad_gradient_on_one(rank: int) -> None:
    """One sample of zeros, in the second batch of rank 1."""
    x, y = plain.FORGET.tensors
    x = x.clone()
    x[9] = 0
    _measure(sharded(built(Kinked)(torch.float32), "layers"), TensorDataset(x, y))


def mixed_precision(rank: int) -> None:
    """FSDP2 casts the weights to bfloat16."""
    _measure(fully_shard(plain.perceptron(), mp_policy=MixedPrecisionPolicy(torch.bfloat16)))


def half_weights(rank: int) -> None:
    """Shards in bfloat16."""
    _measure(fully_shard(plain.perceptron().bfloat16()))


def tensor_parallel(rank: int) -> None:
    """DTensors that are not FSDP2's."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    _measure(parallelize_module(plain.perceptron(), mesh, {"1": ColwiseParallel()}))


def half_of_the_ranks(rank: int) -> None:
    """A model on each rank for itself, sharded over one."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    _measure(fully_shard(plain.perceptron(), mesh=mesh["b"]))


def other_method(rank: int) -> None:
    """A method that ranks all entries of the model."""
    run = deepclean.Session(sharded(plain.perceptron(), "root"), deepclean.ASSD(), **plain.OPTIONS)
    run.measure(plain.FORGET, plain.RETAIN)


def unwritable(rank: int) -> None:
    """Rank 0 alone writes, and cannot."""
    model = sharded(plain.network(), "layers")
    made = deepclean.fisher_diagonal(model, plain.FORGET, batch_size=4, progress=False)
    made.save(Path("no such folder") / "here.safetensors")


def chosen_gamma(rank: int) -> None:
    """gamma="auto" tries copies of the model."""
    method = deepclean.DeepClean(gamma="auto")
    run = deepclean.Session(sharded(plain.perceptron(), "root"), method, **plain.OPTIONS)
    run.measure(plain.FORGET, plain.RETAIN)


def mixed_samples(rank: int) -> None:
    """Batch normalisation without running statistics."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()
    )
    _measure(sharded(nn.Sequential(model, nn.Linear(64, 5)), "root"))


CHECKS: dict[str, Callable[[int], Any]] = {
    **{key(row): lambda rank, row=row: fisher(row) for row in TABLE},
    **{
        check.__name__: check
        for check in (
            ddp,
            session,
            context_manager,
            resumed_hook,
            stored,
            others,
            dead,
            moved_on_one,
            bad_label_on_one,
            unreadable_on_one,
            not_finite_on_one,
            bad_gradient_on_one,
            mixed_precision,
            half_weights,
            tensor_parallel,
            half_of_the_ranks,
            other_method,
            chosen_gamma,
            unwritable,
            mixed_samples,
        )
    },
}


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    plain.run_all(CHECKS, FOLDER)
