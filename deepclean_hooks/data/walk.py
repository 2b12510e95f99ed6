"""Walk a data set once, on all ranks, each sample once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tqdm.auto import tqdm

from deepclean_hooks import ranks
from deepclean_hooks.data import batches
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.data.samples import Data, Samples, samples_of


def walk(
    data: Data | Samples,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    name: str = "data",
    progress: str | None = None,
    ids: list[int] | None = None,
) -> Iterator[Batch]:
    """This rank's batches of a data set on `device`, every sample once over all ranks.

    `dtype`, if given, is what floating-point tensors become; `progress` labels a bar that rank 0
    shows on a terminal. Samples are read in index order: order, shuffle, drop_last and padding of a
    loader have no effect. `ids`, if given, is extended by the fingerprints of a batch's samples as
    they were read; a GPU works on the batch before meanwhile.
    """
    source = samples_of(data, name=name)
    # disable=None: tqdm shows nothing where standard error is not a terminal.
    hidden = None if progress is not None and ranks.is_first() else True
    read = source.identified() if ids is not None else (([], batch) for batch in source.batches())
    for known, batch in tqdm(
        read, desc=progress, total=len(source) or None, disable=hidden, leave=False
    ):
        if ids is not None:
            ids.extend(known)
        yield batches.to(batch, torch.device(device), dtype)


def walk_together(
    source: Samples,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: str | None = None,
    ids: list[int] | None = None,
) -> Iterator[tuple[Batch, int]]:
    """As many batches on every rank, of the same size: (batch, how many of its first samples
    count), for a model whose forward pass is a collective. `ids`: as for `walk`.

    A rank with fewer samples than the others repeats some, a rank with none left repeats its last
    batch, and repeated samples do not count. An error in reading is raised on all ranks.
    """
    mine = walk(source, device=device, dtype=dtype, progress=progress, ids=ids)
    kept: Batch | None = None
    while True:
        counted = 0
        with ranks.fail_together():
            batch = next(mine, None)
            if batch is not None:
                kept, counted = batch, batches.size(batch)
        most = max(ranks.gather(counted))
        if not most:
            return
        if kept is None:
            # samples_of refuses streams on several ranks
            kept = batches.to(source.sample(0), torch.device(device), dtype)
        if batches.size(kept) == most:
            yield kept, counted
        else:
            yield batches.rows(kept, torch.arange(most) % batches.size(kept)), counted
