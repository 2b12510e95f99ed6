"""Data whose samples only a walk shows: streams, and loaders that make batches in their way.

Each sample counts once, as far as its content tells; a walk has an end; and every walk has to give
as many samples as the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from deepclean_hooks.data import batches
from deepclean_hooks.data.batches import Batch
from deepclean_hooks.model import random_state

MOST = 1_000_000  # samples of a stream that does not say how many it has
_REPEATS = 1000  # and ten times the distinct samples: then a stream goes round in circles


@dataclass
class Stream:
    """Batches with the fingerprints of their samples, from `start()`, and what is known of them.

    `kind`: what the fingerprints are of; `length`: how many samples a walk has to give, None where
    nothing says so; `passes`: (samples,
    sum of their fingerprints) of each whole walk so far.
    """

    start: Callable[[], Iterable[tuple[list[int], Batch]]]
    name: str
    kind: str
    length: int | None = None
    passes: list[tuple[int, int]] = field(default_factory=list)
    _changes: bool | None = None

    def walk(self) -> Iterator[tuple[list[int], Batch]]:
        """The batches without samples that came before in this walk.

        Warns if there were any. Raises ValueError for a walk without end, and for another number of
        samples than the length or the walk before.
        """
        seen: set[int] = set()
        repeats = 0
        for ids, batch in self.start():
            new = [i for i, sample in enumerate(ids) if _adds(sample, seen)]
            repeats += len(ids) - len(new)
            self._require_end(len(seen), repeats)
            if len(new) == len(ids):
                yield ids, batch
            elif new:
                yield [ids[i] for i in new], batches.rows(batch, torch.tensor(new))
        self._require_same(len(seen), sum(seen) % 2**64)
        if repeats and len(self.passes) == 1:
            warnings.warn(
                f"{repeats} samples of {self.name} came again in the same pass, with the same "
                f"content; each of the {len(seen)} distinct samples is counted once; pass a "
                "Dataset with a length if each of them is to count",
                UserWarning,
                stacklevel=2,
            )

    def changes(self) -> bool:
        """Whether the content of the samples changes from walk to walk; walks once more to see.

        Raises ValueError if the number of samples changes.
        """
        if self._changes is None:
            with random_state.kept():
                random_state.draw_others()  # a walk under the state of the last draws the same
                for _ in self.walk():
                    pass
            self._changes = len({content for _, content in self.passes}) > 1
        return self._changes

    def _require_end(self, distinct: int, repeats: int) -> None:
        most = MOST if self.length is None else self.length
        if distinct > most or repeats > _REPEATS + 10 * distinct:
            length = (
                f"its length says {self.length}"
                if self.length is not None
                else "it has no length and no end in sight"
            )
            raise ValueError(
                f"{self.name} is a stream that gave {distinct + repeats} samples, {distinct} of "
                f"them distinct, and goes on: {length}; pass a Dataset with a length, or a stream "
                "that ends, with its number of samples as __len__"
            )

    def _require_same(self, count: int, content: int) -> None:
        self.passes.append((count, content))
        first = self.passes[0][0]
        if count != first:
            raise ValueError(
                f"two passes over {self.name} gave {first} and {count} samples, so which samples "
                "it holds is not known; pass the Dataset behind it, or a loader that gives all of "
                "them each time"
            )
        if self.length is not None and count < self.length:
            raise ValueError(
                f"a pass over {self.name} gave {count} distinct samples of {self.length}: it "
                "leaves samples out (drop_last) or repeats some; pass the Dataset behind it"
            )


def _adds(sample: int, seen: set[int]) -> bool:
    if sample in seen:
        return False
    seen.add(sample)
    return True
