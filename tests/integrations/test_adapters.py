"""One result from every loop: the same data in the same order end in the same bits, whichever
adapter runs the phases. A table with a row for each adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

import deepclean_hooks as deepclean
from deepclean_hooks import _ADAPTERS
from lab.training import FORGET, METHOD, RETAIN, arguments, bits_of, same_bits, timm_vit

lightning = pytest.importorskip("lightning.pytorch")
# Lightning warns of loaders, workers and folders; none of that is the point.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 6
COLLATE = deepclean.ImageClassifier.collate
OPTIONS: dict[str, Any] = {"method": METHOD, "scores": False, "collate_fn": COLLATE}
INTEGRATIONS = Path(__file__).resolve().parents[2] / "integrations"


def loader() -> DataLoader[Any]:
    """37 samples in batches of 5, in order."""
    return DataLoader(RETAIN, batch_size=5, collate_fn=COLLATE)


def batches() -> Iterator[Any]:
    for _, batch in zip(range(STEPS), loader(), strict=False):
        yield batch


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["pixel_values"])["logits"], batch["labels"])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Decays and steps every weight."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def in_a_loop(model: nn.Module, folder: Path) -> None:
    with deepclean.unlearning(model, forget=FORGET, retain=RETAIN, **OPTIONS):
        optimizer = adamw(model)
        model.train()
        for batch in batches():
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def on_accelerate(model: nn.Module, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, adamw(model))
    with deepclean.DeepCleanHook(accelerator, wrapped, forget=FORGET, retain=RETAIN, **OPTIONS):
        wrapped.train()
        for batch in batches():
            accelerator.backward(loss_of(wrapped, batch))
            accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def in_a_trainer(model: nn.Module, folder: Path) -> None:
    optimizer = adamw(model)
    Trainer(
        model=model,
        args=arguments(folder, train_sampling_strategy="sequential"),
        train_dataset=RETAIN,
        data_collator=COLLATE,
        callbacks=[deepclean.DeepCleanCallback(FORGET, method=METHOD, scores=False)],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    ).train()


class Module(lightning.LightningModule):
    """The model in Lightning's form."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model(pixel_values)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.model)


def in_lightning(model: nn.Module, folder: Path) -> None:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    lightning.Trainer(
        default_root_dir=str(folder),
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        gradient_clip_val=0.5,
        callbacks=[deepclean.DeepCleanLightningCallback(FORGET, **OPTIONS)],
        **dict.fromkeys(quiet, False),
    ).fit(Module(model), loader())


LOOPS: dict[str, Callable[[nn.Module, Path], None]] = {
    "unlearning": in_a_loop,
    "DeepCleanHook": on_accelerate,
    "DeepCleanCallback": in_a_trainer,
    "DeepCleanLightningCallback": in_lightning,
}
# `unlearn` has a recipe of its own, on Accelerate; `ImageClassifier` is what a Trainer's model is.
WITHOUT_A_LOOP = {"unlearn", "ImageClassifier", "WhenForgotten"}
# What several adapters share.
SHARED = {"__init__", "beginning", "callback", "pretrained", "run_output", "stored_training"}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Accelerate keeps one state a process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What a loop of one's own ends in."""
    model = timm_vit()
    before = bits_of(model)
    in_a_loop(model, tmp_path_factory.mktemp("plain"))
    assert not same_bits(bits_of(model), before)
    return bits_of(model)


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_ends_in_the_same_bits(
    name: str, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    """Fails if an adapter measures, resets or clips otherwise than the plain loop, by one bit."""
    model = timm_vit()
    LOOPS[name](model, tmp_path)
    assert same_bits(bits_of(model), plain)


def test_every_adapter_has_a_row() -> None:
    """Fails if an adapter, or a file of one, is added without a row above."""
    assert set(LOOPS) | WITHOUT_A_LOOP == set(_ADAPTERS) <= set(deepclean.__all__)
    files = {path.stem for path in INTEGRATIONS.glob("*.py")}
    assert files == set(_ADAPTERS.values()) | SHARED
