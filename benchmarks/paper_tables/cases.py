"""One scenario of one seed: its sets, its original and gold, and what is measured of them once."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.utils.data import Subset

import deepclean_hooks as deepclean
from deepclean_hooks.stored.files import written_whole
from scenarios import Data, Scenario

from .models import Trained, gold, original, scenario
from .setups import Setup
from .stopwatch import stopwatch

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
    def gold(self) -> Trained:
        """The network that never saw the forget set."""
        return gold(self.setup, self.scenario, self.seed)

    @cached_property
    def gold_scores(self) -> deepclean.Evaluation:
        """What the others are compared with."""
        return self.judged(self.gold.model, against=None)

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
    def retain_fisher(self) -> tuple[deepclean.FisherDiagonal, float]:
        """The Fisher diagonal of D_r, every parameter, and the seconds that it took: measured once
        and paid by each cell that reads it."""
        path = self.setup.folder / f"fisher_{self.scenario}_{self.seed}.safetensors"
        told = path.with_suffix(".json")
        if not told.exists():
            with stopwatch(self.setup.device) as seconds:
                fisher = deepclean.fisher_diagonal(
                    self.original.model, self.sets.retain, batch_size=MEASURED, progress=False
                )
            fisher.save(path)
            with written_whole(told) as temporary, open(temporary, "w", encoding="utf-8") as file:
                json.dump({"seconds": seconds[0]}, file)
        stored = deepclean.FisherDiagonal.load(path, self.setup.device)
        return stored, json.loads(told.read_text(encoding="utf-8"))["seconds"]

    def few(self, data: Data, count: int) -> Subset[tuple[torch.Tensor, ...]]:
        """So many samples of a set, drawn by the seed."""
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.seed))  # type: ignore[arg-type]  # a Subset has a length
        return Subset(data, sorted(order[:count].tolist()))
