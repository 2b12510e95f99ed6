"""One scenario of one seed: its sets, its original and gold, and what is measured of them once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.utils.data import Subset

import deepclean_hooks as deepclean
from benchmarks.lab import results
from benchmarks.lab.timer import comparing
from examples.scenarios import Data, Scenario

from .models import Trained, gold, original, scenario
from .setups import Setup

EVALUATED = 500  # samples of a batch when judging
MEASURED = 128  # samples of a batch when measuring


@dataclass(frozen=True)
class Case:
    """What the cells of one scenario and seed share."""

    setup: Setup
    scenario: str
    seed: int

    @cached_property
    def sets(self) -> Scenario:
        """What to forget, and the sets to judge by."""
        return scenario(self.setup, self.scenario, self.seed)

    @cached_property
    def original(self) -> Trained:
        """The network that is to forget."""
        return original(self.setup, self.seed)

    @cached_property
    def gold(self) -> Trained | None:
        """The network that never saw the forget set; None beside an original of unknown recipe."""
        if self.setup.checkpoint is not None:
            return None
        return gold(self.setup, self.scenario, self.seed)

    @cached_property
    def gold_scores(self) -> deepclean.Evaluation | None:
        """What the others are compared with."""
        return None if self.gold is None else self.judged(self.gold.model, against=None)

    def copy(self) -> nn.Module:
        """The original, to be changed."""
        return copy.deepcopy(self.original.model)

    def judged(
        self, model: nn.Module, against: deepclean.Evaluation | None
    ) -> deepclean.Evaluation:
        """All figures of a model, with the gaps to a gold's."""
        return deepclean.evaluate(
            model, **self.sets.sets(), gold=against, batch_size=EVALUATED, progress=False
        )

    @cached_property
    def stored_fisher(self) -> tuple[deepclean.FisherDiagonal, float]:
        """The Fisher diagonal that cells read instead of measuring it, every parameter, and the
        seconds that each of them pays for it.

        Of D_r, measured once for the cells of a scenario and paid by each. Beside a checkpoint it
        is that of the whole training set, as the owner of a model would store it: measured once,
        whatever is to be forgotten, and paid by no cell.
        """
        whole = self.setup.checkpoint is not None
        of = "train" if whole else f"{self.scenario}_{self.seed}"
        data = self.setup.images.train if whole else self.sets.retain
        path = self.setup.folder / f"fisher_{of}.safetensors"

        def measure() -> dict[str, float]:
            with comparing(self.setup.device).spent() as seconds:
                fisher = deepclean.fisher_diagonal(
                    self.original.model, data, batch_size=MEASURED, progress=False
                )
            fisher.save(path)
            return {"seconds": seconds[0]}

        seconds = results.kept(path.with_suffix(".json"), measure)["seconds"]
        return deepclean.FisherDiagonal.load(path, self.setup.device), 0.0 if whole else seconds

    def few(self, data: Data, count: int) -> Subset[tuple[torch.Tensor, ...]]:
        """So many samples of a set, drawn by the seed."""
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.seed))  # type: ignore[arg-type]  # a Subset has a length
        return Subset(data, sorted(order[:count].tolist()))
