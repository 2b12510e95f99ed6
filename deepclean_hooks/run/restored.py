"""What became of W_f by the end: entries that hold their old values again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deepclean_hooks.guard.guard import GuardError
from deepclean_hooks.ranks import shards
from deepclean_hooks.run.phases import WasReset

WARN_ABOVE, REFUSE_ABOVE = 0.05, 0.9  # of the entries that the reset changed


@dataclass(frozen=True)
class Restored:
    """By parameter, how many entries the reset changed and how many hold their old bits again."""

    changed: Mapping[str, int]
    back: Mapping[str, int]

    @property
    def entries(self) -> int:
        """How many are back."""
        return sum(self.back.values())

    @property
    def share(self) -> float:
        """The share of the changed entries that are back, 0 to 1."""
        return self.entries / max(1, sum(self.changed.values()))

    @property
    def warning(self) -> str:
        """What the report says of it; empty for a share that chance can make."""
        return self._told() if self.share > WARN_ABOVE else ""

    def require_few(self) -> None:
        """Raises GuardError if nearly all are back."""
        if self.share > REFUSE_ABOVE:
            raise GuardError(
                f"{self._told()}: nothing was forgotten. Weights from before the reset were put "
                'back (the "best" ones of an early stopping, a checkpoint, an average); compare '
                "and keep weights from inside the block only, and begin anew"
            )

    def _told(self) -> str:
        names = [name for name, count in self.back.items() if count]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"{self.entries} of the {sum(self.changed.values())} entries that the reset changed "
            f"hold their old values again, in {', '.join(names[:3])}{more}"
        )


def restored(
    at: WasReset,
    parameters: Mapping[str, Tensor],
    before: Mapping[str, str],
    after: Mapping[str, str],
) -> Restored:
    """What is back, of all ranks together.

    A resumed run has no old values; there a whole tensor counts, by its digest `before` and
    `after`.
    """
    if at.originals is not None:
        back = shards.counted(at.originals.back(parameters), parameters)
    else:
        back = {
            name: count if before.get(name) == after.get(name) else 0
            for name, count in at.changed.items()
        }
    return Restored(at.changed, back)
