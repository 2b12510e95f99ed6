"""A training of `unlearn` in a file: a killed run goes on where it was, to the same bits."""

from __future__ import annotations

import hashlib
import io
import random
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from deepclean_hooks import ranks
from deepclean_hooks.integrations.beginning import verified
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.session import Session
from deepclean_hooks.stored import sealed
from deepclean_hooks.stored.sealed import BrokenRun

SECONDS = 60.0
"""The work within an epoch that a kill costs at most; after each epoch the run is stored too."""


class StoredTraining:
    """One run's session, weights, optimizer, schedule, and what is drawn next.

    Without a path nothing is stored. All ranks call every method; rank 0 writes, whole or not at
    all.
    """

    def __init__(self, path: Path | None, model: nn.Module, loader: DataLoader[Any]) -> None:
        """Loads the weights of the file, if there is one; raises BrokenRun, with the way out, if it
        is damaged or altered."""
        assert loader.generator is not None  # Samples.shuffled gave it one
        self._path, self._model, self._generator = path, model, loader.generator
        self._per_epoch = len(loader)
        self._parts: dict[str, Any] = {}  # what is trained with, by its place in the file
        self._order = self._generator.get_state()  # before the epoch that is being drawn
        self._last = time.monotonic()
        self._training: Mapping[str, Any] = {}
        self.session: Mapping[str, Any] | None = None
        """The state of a run that goes on."""
        if path is not None and ranks.gather(path.is_file())[0]:
            self._take_up(path)

    def begin(self, run: Session, optimizer: Any, schedule: Any) -> int:
        """Takes up the state of both; returns the steps that were done before."""
        self._run = run
        self._parts = {"optimizer": optimizer, "schedule": schedule}
        for name, part in self._parts.items():
            if name in self._training:
                part.load_state_dict(self._training[name])
        if "order" in self._training:
            self._generator.set_state(self._training["order"])
        return int(self._training.get("done", 0))

    def batches(self, retain: DataLoader[Any], first: int, steps: int) -> Iterator[Any]:
        """The batches of the steps from `first` on, epoch after epoch."""
        done = first - first % self._per_epoch
        while done < steps:
            self._order = self._generator.get_state()
            if done > first or not first:
                self._store(done)
            epoch = iter(retain)
            for _ in islice(epoch, first - done if first > done else 0):
                done += 1
            if done == first and "random" in self._training:
                _set_random(self._training["random"][ranks.world()[0]])
            for batch in islice(epoch, steps - done):
                yield batch
                done += 1

    def stepped(self, done: int) -> None:
        """To be called after each step within an epoch; now and then the run is stored."""
        if self._path is None or not done % self._per_epoch:
            return
        if ranks.gather(time.monotonic() - self._last > SECONDS)[0]:
            self._store(done)

    def end(self, steps: int) -> None:
        """Stores the trained model."""
        self._store(steps)

    def _store(self, done: int) -> None:
        if self._path is None:
            return
        training = {name: part.state_dict() for name, part in self._parts.items()}
        training |= {"done": done, "order": self._order, "random": ranks.gather(_random())}
        state = sealed.seal(self._run.state_dict(), self._model)
        weights = unwrap(self._model).state_dict()
        packed = io.BytesIO()
        torch.save(training, packed)
        whole = packed.getvalue()
        state |= {
            "weights": weights,
            "training": torch.frombuffer(bytearray(whole), dtype=torch.uint8),
        }
        state["of_training"] = hashlib.sha256(whole).hexdigest()
        with ranks.fail_together():
            if ranks.is_first():
                sealed.write(state, self._path)
        self._last = time.monotonic()

    def _take_up(self, path: Path) -> None:
        way_out = f"remove {path} to begin anew from the original model"
        with ranks.fail_together():
            stored = sealed.read(path)
            inner = unwrap(self._model)
            try:
                inner.load_state_dict(stored["weights"])
                whole = stored["training"].numpy().tobytes()
            except (KeyError, TypeError, RuntimeError, AttributeError) as reason:
                raise BrokenRun(f"{path} holds no run of this model; {way_out}") from reason
            if hashlib.sha256(whole).hexdigest() != stored.get("of_training"):
                raise BrokenRun(f"the training in {path} was altered; {way_out}")
            self._training = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
        self.session = verified(self._model, stored, str(path), way_out)


def _random() -> dict[str, Any]:
    """What dropout, augmentation and the like draw from."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, inner, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": [version, list(inner), gauss],
    }


def _set_random(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
