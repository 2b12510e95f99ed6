"""Samples that change from pass to pass, by an augmenting transform: looked for, and said."""

from __future__ import annotations

import random
import warnings

from torch.utils.data import default_collate

from deepclean_hooks.data import batches, fingerprints
from deepclean_hooks.data.samples import Samples
from deepclean_hooks.model import random_state

PROBES = 32  # samples that are read twice, spread over the set


def changes_from_pass_to_pass(source: Samples, probes: int = PROBES) -> bool:
    """Whether reading a sample twice gives two different samples: an augmenting transform.

    Reads samples spread over the set; those of a stream are compared by `Stream.changes`.
    """
    if source.indices is None:
        return False
    # Drawn, because a transform may work on every second sample; always the same ones.
    count = min(probes, len(source.indices))
    chosen = random.Random(0).sample(range(len(source.indices)), count)
    with random_state.kept():
        first, again = (_read(source, chosen) for _ in range(2))
    return first != again


def _read(source: Samples, positions: list[int]) -> tuple[list[int], list[int]]:
    """The fingerprints of some samples, before and after they are collated."""
    assert source.indices is not None
    samples = [source.dataset[source.indices[at]] for at in positions]
    ids = [fingerprints.of_sample(sample) for sample in samples]
    if source.fingerprints == fingerprints.PLAIN:
        return ids, []
    collate, size = source.collate_fn or default_collate, source.batch_size
    pieces = (samples[at : at + size] for at in range(0, len(samples), size))
    return ids, [each for piece in pieces for each in batches.sample_ids(collate(piece))]


def changing_warning(name: str) -> str:
    """What is to be said of a set whose samples change from pass to pass."""
    return (
        f"the samples of {name} change from pass to pass (a random transform): the measurement "
        "is of the augmented samples of this pass, and changes with each pass; use the "
        "test-time transform"
    )


def warn_if_changing(source: Samples, name: str) -> bool:
    """Warns, once a set, that its samples change from pass to pass; returns whether they do."""
    changing = changes_from_pass_to_pass(source)
    if changing:
        warnings.warn(changing_warning(name), UserWarning, stacklevel=3)
    return changing
