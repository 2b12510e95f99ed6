"""How fast a model learns the forget set again: what was only hidden comes back in a few steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from deepclean_hooks import ranks
from deepclean_hooks.data import batches, losses
from deepclean_hooks.data.samples import Data, Samples, samples_of
from deepclean_hooks.metrics.distance import Measured
from deepclean_hooks.metrics.outputs import collect
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.wrappers import unwrap


def relearn_steps(
    model: nn.Module,
    forget: Data | Samples,
    *,
    to_loss: float,
    lr: float = 1e-3,
    most: int = 200,
    batch_size: int | None = None,
    collate_fn: Any = None,
    seed: int = 0,
) -> Measured:
    """How many SGD steps (momentum 0.9) on the forget set alone bring a copy's mean loss on it to
    `to_loss`; the model itself is left as it was.

    Take the original model's loss plus a margin, 1.05 times it say, as `to_loss`, and compare with
    the figure of a gold model: far fewer steps mean the knowledge was hidden, not gone. The loss is
    that of eval mode over the whole set, looked at after each of the first ten steps and then after
    every tenth part more; the same seed gives the same batches to each model.
    """
    meaning = (
        f"SGD steps (lr {lr:g}, momentum 0.9) on the forget set until its mean loss is at most "
        f"{to_loss:g}; the aim is the gold model's figure: fewer steps mean it was hidden, not gone"
    )
    if ranks.world()[1] > 1:
        return Measured(meaning, reason="it trains in one process; several were launched")
    source = (
        forget
        if isinstance(forget, Samples)
        else samples_of(forget, name="forget", batch_size=batch_size, collate_fn=collate_fn)
    )
    pupil = copy.deepcopy(unwrap(model))
    device = no_trace.device_of(pupil)
    trained = [p for p in pupil.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9)
    devices = [device] if device.type == "cuda" else []
    steps = look = 0
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        loader = source.shuffled(seed)
        while True:
            for batch in loader:
                if steps >= look:
                    if float(collect(pupil, source, "forget").loss.mean()) <= to_loss:
                        return Measured(meaning, float(steps))
                    look = steps + max(1, steps // 10)
                if steps >= most:
                    return Measured(meaning, reason=f"not reached in {most} steps")
                batch = batches.to(batch, device)
                with no_trace.training(pupil):
                    losses.cross_entropy(pupil, batch).mean().backward()  # type: ignore[no-untyped-call]  # untyped in torch
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
