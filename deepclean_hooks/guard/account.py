"""What became of the entries that may train: counted at the end, and what of it has to be said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deepclean_hooks import ranks
from deepclean_hooks.ranks.shards import local
from deepclean_hooks.stored.bits import bits


@dataclass(frozen=True)
class Account:
    """What became of the free entries of a parameter (of this rank's shard of it)."""

    free: int  # entries that may train
    zero: int  # those of them that are exactly +0.0, which is what DeepClean's reset gives
    moved: bool  # whether any entry has other bits than when the guard was set
    owned: bool  # whether an optimizer that stepped the model has the parameter in a group
    reached: bool  # whether it had a gradient at such a step


def checksums(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """The sum of each parameter's bits read as integers, in this process: tells whether it moved.

    Changes that cancel to the last bit would pass: no entry is held by this.
    """
    sums = [bits(local(parameter)).sum(dtype=torch.int64) for parameter in parameters.values()]
    return {name: int(total) for name, total in zip(parameters, sums, strict=True)}


def remarks(
    account: Mapping[str, Account], reset: Mapping[str, int], *, seen: int, before: int
) -> list[str]:
    """What a report has to say about reset entries that did not train; all ranks call this.

    `reset`: how many entries of each parameter were reset; `seen`: optimizer steps since the guard
    was set; `before`: those of the run that this one goes on from.
    """
    together = ranks.gather(dict(account))
    wanted = {
        name: [account_of[name] for account_of in together if name in account_of]
        for name, count in reset.items()
        if count and name in account
    }
    if not wanted:
        return []
    moved = {name for name, parts in wanted.items() if any(part.moved for part in parts)}
    if not seen:
        return [] if before else [_WRITTEN if moved else _UNTOUCHED]
    still = {
        name: parts
        for name, parts in wanted.items()
        # What trained before a resume is 0 no more.
        if name not in moved and not (before and any(part.zero < part.free for part in parts))
    }
    unowned = [name for name, parts in still.items() if not any(part.owned for part in parts)]
    unreached = [
        name
        for name, parts in still.items()
        if name not in unowned and not any(part.reached for part in parts)
    ]
    said = []
    if unowned:
        said.append(
            f"{_counted(unowned, reset)} owned by no optimizer that stepped the model, and stay as "
            "the reset left them; give it these parameters too, or select none there "
            "(DeepClean(parameters=...))"
        )
    if unreached:
        said.append(
            f"{_counted(unreached, reset)} without a gradient at every step, and stay as the reset "
            "left them: requires_grad is False, or the loss does not reach them"
        )
    if len(still) == len(wanted) and not said:
        said.append(
            f"{_counted(list(still), reset)} as the reset left them after {seen} optimizer steps: "
            "none moved by a bit; check the learning rate (0, or a warm-up that has not begun) and "
            "that the steps were made (GradScaler skips those with infinite gradients)"
        )
    return said


_UNTOUCHED = (
    "no optimizer step of this model was seen and no weight moved: the reset entries are as the "
    "reset left them. Usual reasons: the loop trained another object (a Trainer with model_init "
    "and skorch's fit() build a new module, a copy was trained), or it never called step()"
)
_WRITTEN = (
    "the weights moved, but no optimizer step was seen: they were written by hand, from copies, or "
    "by an optimizer that is none of torch's. Steps are not counted; the frozen entries were "
    "compared bit by bit at the end"
)


def _counted(names: list[str], reset: Mapping[str, int]) -> str:
    listed = ", ".join(f"{name}: {reset[name]}" for name in names[:5])
    more = f" and {len(names) - 5} more parameters" if len(names) > 5 else ""
    return f"{sum(reset[name] for name in names)} reset entries ({listed}{more}) are"
