"""DeepCleanHook: unlearning around a training loop that runs on Accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from deepclean_hooks import ranks
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import Data
from deepclean_hooks.guard.guard import NormStatistics
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.metrics.evaluation import Evaluation
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks import fsdp
from deepclean_hooks.session import Session
from deepclean_hooks.stored import checkpoint, sealed
from deepclean_hooks.stored.sealed import BrokenRun


class DeepCleanHook:
    """`with DeepCleanHook(accelerator, model, ...) as run:` around a loop; `run.report` afterwards.

    Measures, selects and resets on entry, over all processes, each sample once, prepared loaders
    too; holds the frozen entries inside; reports on exit. Make it before or after
    `accelerator.prepare`, and enter it after. Under FSDP2 it measures the sharded model; what
    cannot be measured so (mixed precision for one) is measured whole by `reset()` before
    `accelerator.prepare`.

    It is registered with the accelerator: `save_state` stores the masks, and after `load_state`,
    called between making and entering it, nothing is measured or reset. The other arguments are
    those of `Session` and `Session.measure`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        forget: Data,
        retain: Data | Measurement,
        method: Method,
        loss_fn: LossFn | None = None,
        norm_statistics: NormStatistics = "update",
        test: Data | None = None,
        gold: nn.Module | Evaluation | None = None,
        scores: bool = True,
        batch_size: int | None = None,
        collate_fn: Any = None,
        progress: bool = True,
    ) -> None:
        """`accelerator` is yours: a second one would reset what both share.

        Raises ValueError for an engine under which no weight can be held, and for a method that
        trains by an objective of its own.
        """
        _refuse_engines(accelerator)
        method.require_plain_training()
        self._accelerator, self._model, self._method = accelerator, model, method
        self._forget, self._retain = forget, retain
        self._options: dict[str, Any] = {
            "loss_fn": loss_fn,
            "norm_statistics": norm_statistics,
            "test": test,
            "gold": gold,
            "scores": scores,
            "batch_size": batch_size,
            "collate_fn": collate_fn,
            "progress": progress,
        }
        self._run: Session | None = None
        self._kept: dict[str, Any] = {}  # the run, from the reset on
        self._inside = False
        accelerator.register_for_checkpointing(self)

    def reset(self) -> Session:
        """Measures, selects and resets now instead of on entry: before FSDP2 shards the model, for
        methods and settings that need it whole."""
        if self._run is not None:
            raise RuntimeError("this hook has a run already; reset() comes once, before `with`")
        run = self._session()
        run.measure(self._forget, self._retain)
        run.select()
        run.reset()
        self._keep(run)
        return run

    def __enter__(self) -> Session:
        """Takes all phases up to the guard that have not been taken."""
        inner = unwrap(self._model)
        if self._accelerator.is_fsdp2 and not fsdp.is_sharded(inner):
            raise RuntimeError(
                "under FSDP2 call accelerator.prepare(...) before `with DeepCleanHook(...)`: what "
                "is held before the sharding is no part of the model after it"
            )
        for model in self._accelerator._models:
            if unwrap(model) is inner:
                ranks.refuse_lossy_reduction(model)
        if self._run is None:
            self.reset()
        assert self._run is not None
        self._run.guard(*self._optimizers(inner))
        self._inside = True
        return self._run

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Counts, scores and reports; after an exception only takes the hooks off."""
        assert self._run is not None
        try:
            if kind is None:
                self._run.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Takes every hook off the model and the optimizers; safe at any time, and twice."""
        if self._run is not None:
            self._run.close()

    def state_dict(self) -> dict[str, Any]:
        """What `accelerator.save_state` stores: the run, and a digest of the weights it saved."""
        if not self._kept:
            return {}
        progress = {} if self._run is None else self._run.so_far()
        return sealed.seal({**self._kept, **progress}, self._model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a stored run; `accelerator.load_state` calls this when it has the weights.

        Raises BrokenRun if the run was altered or the weights did not come back bit for bit.
        """
        if self._inside:
            raise RuntimeError("call accelerator.load_state() before `with DeepCleanHook(...)`")
        if not state:  # stored before the reset: there is nothing to take up
            return
        run = self._session()
        with ranks.fail_together():
            stored = sealed.opened(state, "the checkpoint")
        found = checkpoint.model_digest(self._model)
        with ranks.fail_together():
            if found != state["model"]:
                raise BrokenRun(
                    "the weights that were loaded are not those that were saved with this run; "
                    "prepare the model that was trained before accelerator.load_state(), take "
                    "another checkpoint, or begin anew from the original model"
                )
        run.load_state_dict(stored)
        run.watch(forget=self._forget)
        if not isinstance(self._retain, Measurement):
            run.watch(retain=self._retain)
        self._keep(run)

    # ------------------------------------------------------------------ inside

    def _session(self) -> Session:
        return Session(self._model, self._method, **self._options)

    def _keep(self, run: Session) -> None:
        self._run, self._kept = run, run.state_dict()

    def _optimizers(self, model: nn.Module) -> list[Optimizer]:
        """The prepared optimizers that step the model."""
        ours = {id(p) for p in model.parameters()}
        return [
            optimizer
            for optimizer in self._accelerator._optimizers
            if any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
        ]


def _refuse_engines(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{kind.value} steps flattened copies of the weights, which no mask of the weights can "
            "hold; use DistributedDataParallel or FSDP2"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP1 flattens parameters into one-dimensional shards, so no entry can be named or "
            "held; use FullyShardedDataParallelPlugin(fsdp_version=2) or DistributedDataParallel"
        )
