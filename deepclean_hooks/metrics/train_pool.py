"""Train a pool of models once, keep each on disk, and go on where an earlier call was stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from deepclean_hooks import ranks
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.stored.files import written_whole

Train = Callable[[int, Sequence[int]], nn.Module]
"""Maps (seed, indices of the training samples) to a trained model."""


def train_pool(
    train: Train,
    jobs: Iterable[tuple[int, Sequence[int]]],
    folder: str | os.PathLike[str],
    *,
    build: Callable[[], nn.Module],
) -> Iterator[nn.Module]:
    """Trains the model of each (seed, indices) that `folder` does not hold yet, then yields all of
    them, one at a time, in the order of the jobs.

    What is kept is each model's state_dict, written whole or not at all, so that a call that was
    stopped can be repeated; `build()` makes the module that it is loaded into. A file's name is
    made of the seed and the indices, not of `train`: use another folder for another recipe. Where
    several ranks were launched each trains its share, and all must reach the folder. The models
    come back in eval mode on the CPU.
    """
    listed = [(int(seed), tuple(int(i) for i in indices)) for seed, indices in jobs]
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    paths = [where / _name(seed, indices) for seed, indices in listed]
    with ranks.fail_together():
        for i in ranks.share(len(listed)):
            if not paths[i].is_file():
                seed, indices = listed[i]
                _write(unwrap(train(seed, indices)), paths[i])
    return _loaded(paths, build)


def split_jobs(
    samples: int, forget: Sequence[int], *, models: int, first_seed: int = 0
) -> tuple[list[tuple[int, list[int]]], list[tuple[int, list[int]]]]:
    """(jobs with all `samples` training samples, jobs without the forget indices), `models` each,
    all with different seeds: what U-LiRA and KLoM need before the former are unlearned."""
    out = set(forget)
    beyond = [i for i in out if not 0 <= i < samples]
    if beyond:
        raise ValueError(f"forget index {beyond[0]} is not below {samples}, the number of samples")
    everything = list(range(samples))
    rest = [i for i in everything if i not in out]
    seeds = range(first_seed, first_seed + 2 * models)
    return [(s, everything) for s in seeds[:models]], [(s, rest) for s in seeds[models:]]


def _loaded(paths: list[Path], build: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    for path in paths:
        model = build()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        yield model.eval()


def _name(seed: int, indices: tuple[int, ...]) -> str:
    digest = hashlib.sha256(repr(indices).encode()).hexdigest()[:16]
    return f"seed{seed}-{len(indices)}-{digest}.pt"


def _write(model: nn.Module, path: Path) -> None:
    state = {name: value.to("cpu") for name, value in model.state_dict().items()}
    with written_whole(path) as temporary:
        torch.save(state, temporary)
