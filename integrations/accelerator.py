"""DeepCleanHook: unlearning around a training loop that runs on Accelerate."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from deepclean_hooks import ranks
from deepclean_hooks.data.samples import Data
from deepclean_hooks.integrations.beginning import begin, require_same_way, take_up, verified
from deepclean_hooks.integrations.loop import LoopRun
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.options import Options, require_known
from deepclean_hooks.ranks import fsdp
from deepclean_hooks.session import Session
from deepclean_hooks.stored import sealed
from deepclean_hooks.stored.sealed import BrokenRun

_WAY_OUT = (
    "Prepare the model that was trained before accelerator.load_state(), take another checkpoint, "
    "or begin anew from the original model"
)


class DeepCleanHook:
    """`with DeepCleanHook(accelerator, model, ...) as run:` around a loop; `run.report` afterwards.

    Measures, selects and resets on entry, over all processes, each sample once, prepared loaders
    too; holds the frozen entries inside; reports on exit. Make it before or after
    `accelerator.prepare`, and enter it after. Under FSDP2 it measures the sharded model; what
    cannot be measured so (mixed precision for one) is measured whole by `reset()` before
    `accelerator.prepare`.

    `accelerator.save_state` writes deepclean.pt, the masks and a digest of the weights, into its
    folder. After `load_state` of such a folder, called between making and entering the hook,
    nothing is measured or reset; a folder without that file is a start, such as the original
    training's. Where `load_state` was called before the hook is made, pass `resume=` its folder.
    `folder`: where report.json and report.txt are written. The options are those of `Session`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        forget: Data,
        retain: Data | Measurement,
        method: Method,
        resume: str | Path | None = None,
        folder: str | Path | None = None,
        **options: Unpack[Options],
    ) -> None:
        """`accelerator` is yours: a second one would reset what both share.

        Raises ValueError for an engine under which no weight can be held, and for a method that
        trains by an objective of its own; BrokenRun for a `resume` folder without a run.
        """
        _refuse_engines(accelerator)
        require_known(options, "DeepCleanHook")
        method.require_plain_training()
        self._accelerator, self._model, self._method = accelerator, model, method
        self._forget, self._retain = forget, retain
        self._options, self._folder = options, folder
        self._run: LoopRun | None = None
        self._kept: dict[str, Any] = {}  # the run, from the reset on
        self._loaded: tuple[dict[str, Any], Path] | None = None  # not verified yet
        self._inside = False
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)
        require_same_way(resumes=resume is not None)
        if resume is not None:
            with ranks.fail_together():
                path = Path(resume) / self._file_name()
                self._loaded = (sealed.read(path), path)

    def reset(self) -> Session:
        """Measures, selects and resets now instead of on entry: before FSDP2 shards the model, for
        methods and settings that need it whole."""
        if self._run is not None or self._loaded is not None:
            raise RuntimeError("this hook has a run already; reset() comes once, before `with`")
        require_same_way(resumes=False)
        run = self._session()
        begin(run, self._forget, self._retain)
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
        if self._loaded is not None:
            self._take_up(*self._loaded)
        elif self._run is None:
            self.reset()
        assert self._run is not None
        self._run.set_guard(self._optimizers(inner))
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
            self._inside = False
            self.close()

    def close(self) -> None:
        """Takes every hook off the model and the optimizers; safe at any time, and twice."""
        if self._run is not None:
            self._run.close()

    # ------------------------------------------------------------------ save_state, load_state

    # Files of ours, not `register_for_checkpointing`: Accelerate unpickles what is registered, so a
    # file that somebody else wrote ran their code; and it refuses folders with another number.

    def _save(self, models: list[nn.Module], weights: Any, folder: str) -> None:
        if not self._kept:
            return
        progress = {} if self._run is None else self._run.so_far()
        entry = sealed.seal({**self._kept, **progress}, self._model)  # all ranks, if it is sharded
        with ranks.fail_together():
            if self._writes():
                sealed.write(entry, Path(folder) / self._file_name())

    def _load(self, models: list[nn.Module], folder: str) -> None:
        if self._inside:
            raise RuntimeError("call accelerator.load_state() before `with DeepCleanHook(...)`")
        with ranks.fail_together():
            path = Path(folder) / self._file_name()
            if not path.is_file():
                _refuse_earlier_format(path.parent)
            self._loaded = (sealed.read(path), path) if path.is_file() else None

    def _take_up(self, stored: dict[str, Any], path: Path) -> None:
        require_same_way(resumes=True)
        state = verified(self._model, stored, str(path), _WAY_OUT)
        run = self._session()
        take_up(run, state, self._forget, self._retain)
        self._keep(run)
        self._loaded = None

    def _file_name(self) -> str:
        """By the place of the model among those prepared, as Accelerate names its own files."""
        inner = unwrap(self._model)
        places = [i for i, m in enumerate(self._accelerator._models) if unwrap(m) is inner]
        return f"deepclean_{places[0]}.pt" if places and places[0] else "deepclean.pt"

    def _writes(self) -> bool:
        each_node: bool = self._accelerator.project_configuration.save_on_each_node
        first: bool = self._accelerator.is_main_process
        local: bool = self._accelerator.is_local_main_process
        return local if each_node else first

    # ------------------------------------------------------------------ inside

    def _session(self) -> LoopRun:
        return LoopRun(self._model, self._method, folder=self._folder, **self._options)

    def _keep(self, run: LoopRun) -> None:
        self._run, self._kept = run, run.state_dict()

    def _optimizers(self, model: nn.Module) -> list[Optimizer]:
        """The prepared optimizers that step the model."""
        ours = {id(p) for p in model.parameters()}
        return [
            optimizer
            for optimizer in self._accelerator._optimizers
            if any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
        ]


def _refuse_earlier_format(folder: Path) -> None:
    """Raises BrokenRun for a run that an earlier version registered with the accelerator."""
    for path in folder.glob("custom_checkpoint_*.pkl"):
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # somebody else's object, which is theirs to load
            continue
        if isinstance(stored, dict) and str(stored.get("format")).startswith("deepclean-hooks run"):
            raise BrokenRun(
                f"{path} holds the run of an earlier version of deepclean-hooks; finish it with "
                "that version, or begin anew from the original model"
            )


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
