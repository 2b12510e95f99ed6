"""What each of the processes of test_collectives.py does; run with RANK, WORLD_SIZE and a port."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import deepclean_hooks as deepclean
from deepclean_hooks.stored import sealed
from deepclean_hooks.stored.bits import differing, digest
from lab import small

METHOD = deepclean.DeepClean(gamma=1.1)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Seeded; an odd number of rows, so that shards are uneven; the second convolution's squares
    lie in memory otherwise than its weight."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 7, 3, padding=1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(112, 5)).to(dtype)


def perceptron() -> nn.Module:
    """Without BatchNorm: what it learns from a batch does not depend on how that is split."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 33), nn.Tanh(), nn.Linear(33, 5))


samples = partial(small.samples, of=64)
FORGET, RETAIN = samples(0, 13), samples(13, 50)
OPTIONS: dict[str, Any] = {"scores": False, "progress": False}


def session(model: nn.Module, **options: Any) -> deepclean.Session:
    """A session without scores."""
    return deepclean.Session(model, METHOD, **{**OPTIONS, "batch_size": 4, **options})


def fisher(count: int, dtype: torch.dtype) -> dict[str, Any]:
    """The Fisher sums of the first `count` samples; eval mode differs from the training mode."""
    found = deepclean.fisher_diagonal(
        network(dtype), samples(0, count, dtype), batch_size=4, progress=False
    )
    return {"sums": found.sums, "count": found.count, "samples": found.samples}


def padded(kind: str) -> dict[str, Any]:
    """13 samples behind a loader that repeats some to make the ranks even."""
    data = samples(0, 13, torch.float64)
    if kind == "accelerate":
        from accelerate import Accelerator

        loader = Accelerator(cpu=True).prepare(DataLoader(data, batch_size=5, shuffle=True))
    else:
        loader = DataLoader(data, batch_size=5, sampler=DistributedSampler(data))
    walked = sum(len(labels) for _, labels in loader) * dist.get_world_size()
    found = deepclean.fisher_diagonal(network(torch.float64), loader, progress=False)
    return {"sums": found.sums, "count": found.count, "walked": walked}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Moves every weight it owns, by decay alone."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(
    model: nn.Module,
    rank: int,
    steps: int = 4,
    first: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """AdamW with decay and clipping; each rank its own samples."""
    optimizer = optimizer or adamw(model)
    model.train()
    for step in range(first, steps):
        chosen = range(8 * step + rank, 8 * step + 8, dist.get_world_size())
        x, y = (tensor[list(chosen)] for tensor in RETAIN.tensors)
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def full(tensor: Tensor) -> Tensor:
    """Gathered, where it is a shard."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def outcome(model: nn.Module, then: dict[str, Tensor], run: deepclean.Session) -> dict[str, Any]:
    """What moved, counted here, and what a rank has at the end."""
    now = {name: full(p) for name, p in model.named_parameters()}
    free = {name: full(mask) for name, mask in run.free.items()}
    frozen = {n: ~free[n] if n in free else torch.ones_like(p) > 0 for n, p in now.items()}
    return {
        "masks": digest({n: m.to(torch.uint8) for n, m in free.items()}),
        "frozen moved": sum(int((differing(p, then[n]) & frozen[n]).sum()) for n, p in now.items()),
        "free moved": sum(int((differing(p, then[n]) & ~frozen[n]).sum()) for n, p in now.items()),
        "weights": digest(now),
        "reported": run.report.frozen_entries_moved,
        "steps": run.report.optimizer_steps,
    }


def ddp(rank: int) -> dict[str, Any]:
    """A whole run under DistributedDataParallel."""
    model = network()
    then = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = nn.parallel.DistributedDataParallel(model)
    run = session(wrapped).measure(FORGET, RETAIN)
    run.select()
    run.reset().guard()
    train(wrapped, rank)
    run.finish()
    return outcome(model, then, run)


def accelerate_hook(rank: int) -> dict[str, Any]:
    """A whole run on Accelerate, with prepared loaders that pad."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    then = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    wrapped, optimizer, forget, retain = accelerator.prepare(
        model, optimizer, DataLoader(FORGET, batch_size=5), DataLoader(RETAIN, batch_size=5)
    )
    hook = deepclean.DeepCleanHook(
        accelerator, wrapped, forget=forget, retain=retain, method=METHOD, progress=False
    )
    with hook as run:
        wrapped.train()
        for x, y in retain:
            accelerator.backward(F.cross_entropy(wrapped(x), y))
            optimizer.step()
            optimizer.zero_grad()
    found = outcome(model, then, run)
    counts = [run.report.forget_samples, run.report.retain_samples]
    after = run.report.scores["after"]["sets"]
    return {**found, "counts": counts, "scored": [after[n]["count"] for n in ("forget", "retain")]}


def recipe(rank: int) -> dict[str, Any]:
    """unlearn(), as it is called in one process; 36 samples in batches of 12 need no filling up."""
    model = perceptron().double()
    forget, retain = samples(0, 13, torch.float64), samples(13, 49, torch.float64)
    report = deepclean.unlearn(
        model, forget, retain, method=METHOD, epochs=2, batch_size=12, progress=False
    )
    return {
        "state": model.state_dict(),
        "moved": report.frozen_entries_moved,
        "steps": report.optimizer_steps,
        "accuracy": report.scores["after"]["sets"]["retain"]["accuracy"],
        "leftover": "_original_forward" in vars(model),
    }


def drifted_buffers(rank: int) -> dict[str, Any]:
    """The scores of a model whose running statistics differ between ranks: those of rank 0's."""
    model = network()
    with torch.no_grad():
        model[1].running_mean.fill_(0.3 * rank)
    before = model[1].running_mean.clone()
    found = deepclean.evaluate(model, test=RETAIN, progress=False)
    assert torch.equal(model[1].running_mean, before)  # no trace
    return {"loss": found.sets["test"].loss, "count": found.sets["test"].count}


# ---------------------------------------------------------------------------- errors


class FailsOnSecondRank(Dataset[tuple[Tensor, Tensor]]):
    """A file that only one rank cannot read."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __len__(self) -> int:
        return 13

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if dist.get_rank() == 1 and i == 7:
            raise self.error("no such file")
        x, y = FORGET[i]
        return x, y


def other_gamma(rank: int) -> None:
    """Ranks with different settings."""
    method = deepclean.DeepClean(gamma=1.0 + rank)
    deepclean.Session(network(), method, **OPTIONS).measure(FORGET, RETAIN)


def other_scores(rank: int) -> None:
    """Scores on one rank only: an evaluation is collectives."""
    session(network(), scores=bool(rank)).measure(FORGET, RETAIN)


def other_loss(rank: int) -> None:
    """Two losses of one name."""

    def made(smoothing: float) -> Any:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            logits, labels = model(batch[0]), batch[1]
            options: Any = {"reduction": "none", "label_smoothing": smoothing}
            return F.cross_entropy(logits, labels, **options)

        return loss

    session(network(), loss_fn=made(0.1 * rank)).measure(FORGET, RETAIN)


def other_statistics(rank: int) -> None:
    """Another policy on each rank."""
    policy = ("update", "freeze")[rank]
    session(network(), norm_statistics=policy).measure(FORGET, RETAIN)


def other_way(rank: int) -> None:
    """One rank resumes, the other measures."""
    model = network()
    run = session(model).measure(FORGET, RETAIN)
    run.select()
    state = run.reset().state_dict()
    if rank:
        session(model).load_state_dict(state)
    else:
        session(network()).measure(FORGET, RETAIN)


def ended_apart(rank: int) -> list[list[str]]:
    """What the report warns of: other numbers of steps, other weights, and neither."""
    told = []
    for steps, first in ((1 + rank, 0), (1, rank), (1, 0)):
        model = perceptron()
        run = session(model).measure(FORGET, RETAIN)
        run.select()
        run.reset().guard()
        optimizer = adamw(model)
        for step in range(first, first + steps):
            x, y = (t[step : step + 8] for t in RETAIN.tensors)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        told.append(list(run.finish().warnings))
    return told


def other_weights(rank: int) -> None:
    """Ranks with different models."""
    model = network()
    with torch.no_grad():
        next(model.parameters())[0] += rank
    session(model).measure(FORGET, RETAIN)


def other_split(rank: int) -> None:
    """An unseeded split on each rank: as many samples, other ones."""
    everything = samples(0, 50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(rank)).tolist()
    session(network()).measure(Subset(everything, order[:13]), Subset(everything, order[13:]))


def other_content(rank: int) -> None:
    """The same indices of other data."""
    x, y = FORGET.tensors
    session(network()).measure(TensorDataset(x + rank, y), RETAIN)


def other_length(rank: int) -> None:
    """One sample more on one rank."""
    session(network()).measure(samples(0, 12 + rank), RETAIN)


def empty_on_one(rank: int) -> None:
    """No sample on one rank."""
    session(network()).measure(samples(0, 13 * (1 - rank)), RETAIN)


def unreadable_on_one(rank: int) -> None:
    """A data set that raises what nobody expects, on one rank."""
    session(network()).measure(FailsOnSecondRank(OSError), RETAIN)


def bad_label_on_one(rank: int) -> None:
    """Sample 7 falls to rank 1."""
    x, y = FORGET.tensors
    y = y.clone()
    y[7] = 99
    session(network()).measure(TensorDataset(x, y), RETAIN)


def bad_label_when_scored(rank: int) -> None:
    """The same in an evaluation."""
    x, y = FORGET.tensors
    y = y.clone()
    y[7] = 99
    deepclean.evaluate(network(), test=TensorDataset(x, y), progress=False)


def other_masks(rank: int) -> None:
    """A method that selects at random."""

    class Random(deepclean.DeepClean):
        def select(self, forget: Any, retain: Any) -> Any:
            found = super().select(forget, retain)
            next(iter(found.masks.values())).view(-1)[rank] ^= True
            return found

    run = deepclean.Session(network(), Random(gamma=1.1), **OPTIONS).measure(FORGET, RETAIN)
    run.select()


def powersgd(rank: int) -> None:
    """Gradients compressed by PowerSGD."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    wrapped = nn.parallel.DistributedDataParallel(network())
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1)
    wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    run = session(wrapped).measure(FORGET, RETAIN)
    run.select()
    run.reset().guard()


def guarded_before_sharding(rank: int) -> None:
    """A guard that FSDP2 takes the parameters from."""
    from torch.distributed.fsdp import fully_shard

    model = perceptron()
    run = session(model).measure(FORGET, RETAIN)
    run.select()
    run.reset().guard()
    train(fully_shard(model), rank, steps=1)
    run.finish()


# ---------------------------------------------------------------------------- FSDP2


def fsdp2(rank: int) -> dict[str, Any]:
    """Measured and reset whole, held and trained sharded."""
    from torch.distributed.fsdp import fully_shard

    model = perceptron()
    then = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = session(model, scores=True).measure(FORGET, RETAIN)
    run.select()
    run.reset()
    fully_shard(model[1])
    fully_shard(model)
    run.guard()
    train(model, rank)
    run.finish()
    return {**outcome(model, then, run), "after": run.report.scores["after"]["sets"]}


def resumed_fsdp2(rank: int) -> dict[str, Any]:
    """The hook under FSDP2, stored after 2 of 4 steps and taken up by a new model."""
    from accelerate import Accelerator
    from torch.distributed.fsdp import fully_shard

    class Accelerated(Accelerator):
        is_fsdp2 = True  # on the CPU Accelerate uses DistributedDataParallel, whatever it is told

    def hook(model: nn.Module) -> deepclean.DeepCleanHook:
        sets = {"forget": FORGET, "retain": RETAIN, "method": METHOD}
        return deepclean.DeepCleanHook(Accelerated(cpu=True), model, **sets, **OPTIONS)

    model = perceptron()
    then = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = hook(model)
    one.reset()
    fully_shard(model)
    optimizer = adamw(model)
    with one as run:
        train(model, rank, 2, optimizer=optimizer)
        stored = copy.deepcopy(sealed.seal(run.state_dict(), model))
        weights = {name: full(value) for name, value in model.state_dict().items()}
        moments = copy.deepcopy(optimizer.state_dict())
        train(model, rank, first=2, optimizer=optimizer)
    again = perceptron()
    again.load_state_dict(weights)
    fully_shard(again)
    other = hook(again)
    other._loaded = stored, Path("deepclean.pt")  # as load_state leaves it
    optimizer = adamw(again)
    optimizer.load_state_dict(moments)
    with other as resumed:
        train(again, rank, first=2, optimizer=optimizer)
    uninterrupted, found = outcome(model, then, run), outcome(again, then, resumed)
    return {**found, "agree": found["weights"] == uninterrupted["weights"]}


def unguarded_fsdp2(rank: int) -> dict[str, Any]:
    """The opposite: the same training without a guard."""
    from torch.distributed.fsdp import fully_shard

    model = perceptron()
    then = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = session(copy.deepcopy(model)).measure(FORGET, RETAIN)
    run.select()
    train(fully_shard(model), rank)
    return outcome(model, then, run)


CHECKS: dict[str, Callable[[int], Any]] = {
    "ended apart": ended_apart,
    "fisher 13": lambda rank: fisher(13, torch.float64),
    "fisher 37": lambda rank: fisher(37, torch.float64),
    "fisher 1": lambda rank: fisher(1, torch.float64),
    "fisher 37 float32": lambda rank: fisher(37, torch.float32),
    "padded accelerate": lambda rank: padded("accelerate"),
    "padded sampler": lambda rank: padded("sampler"),
    **{
        check.__name__: check
        for check in (
            ddp,
            accelerate_hook,
            recipe,
            drifted_buffers,
            other_gamma,
            other_weights,
            other_split,
            other_content,
            other_length,
            empty_on_one,
            unreadable_on_one,
            bad_label_on_one,
            bad_label_when_scored,
            other_masks,
            other_scores,
            other_loss,
            other_statistics,
            other_way,
            powersgd,
            guarded_before_sharding,
            fsdp2,
            resumed_fsdp2,
            unguarded_fsdp2,
        )
    },
}


def run_all(checks: dict[str, Callable[[int], Any]], folder: Path) -> None:
    """Every check in turn; what it returns or raises goes to a file of this rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # A check that hangs fails after a minute instead of for ever.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, found = dist.get_rank(), {}
    gc.freeze()  # as tests/conftest.py does
    for name, check in checks.items():
        try:
            found[name] = check(rank)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(ImportError):
            from deepclean_hooks.guard import guard

            guard._guarded.clear()
        dist.barrier()
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
    print(json.dumps(sorted(found)))


if __name__ == "__main__":
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    run_all(CHECKS, Path(sys.argv[1]))
