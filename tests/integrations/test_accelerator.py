"""The Accelerate hook."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

import deepclean_hooks as deepclean
from deepclean_hooks.stored.sealed import BrokenRun
from lab.hooks import hooks_of_torch
from lab.methods import ADDITIVE as every_additive_method
from lab.processes import in_child
from lab.training import (
    ADDITIVE,
    FORGET,
    METHOD,
    RETAIN,
    arguments,
    bits_of,
    callback,
    data,
    hf_vit,
    moved,
    same_bits,
    timm_vit,
    truth,
)

HERE = Path(__file__).resolve().parent
MODELS = {"transformers": hf_vit, "timm": timm_vit}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the reset entries are dead", "ignore:no optimizer step of this model was seen"
)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate's shared state is new for each test, and no hook of torch's is left."""
    before = hooks_of_torch()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert hooks_of_torch() == before


def retain_loader() -> DataLoader[Any]:
    """37 samples in batches of 5, in order."""
    return DataLoader(RETAIN, batch_size=5, collate_fn=deepclean.ImageClassifier.collate)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Decays and steps every weight."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def accumulate(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    """Trains on every batch, a step for as many batches as the accelerator gathers."""
    for batch in loader:
        with accelerator.accumulate(model):
            output = model(batch["pixel_values"])
            accelerator.backward(F.cross_entropy(output["logits"], batch["labels"]))
            optimizer.step()
            optimizer.zero_grad()


def hook(accelerator: Accelerator, model: nn.Module, **options: Any) -> deepclean.DeepCleanHook:
    """The hook without scores."""
    settings = {
        "method": METHOD,
        "scores": False,
        "collate_fn": deepclean.ImageClassifier.collate,
        "progress": False,
    }
    return deepclean.DeepCleanHook(
        accelerator, model, **{"forget": FORGET, "retain": RETAIN, **settings, **options}
    )


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    steps: int = 6,
    first: int = 0,
) -> Iterator[int]:
    """An ordinary loop on Accelerate with clipping; yields after each step."""
    model.train()
    for step, batch in enumerate(loader, 1):
        if step <= first:
            continue
        accelerator.backward(
            F.cross_entropy(model(batch["pixel_values"])["logits"], batch["labels"])
        )
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        yield step
        if step == steps:
            return


def run_all(*everything: Any, **options: Any) -> None:
    """The loop to its end."""
    for _ in train(*everything, **options):
        pass


# ---------------------------------------------------------------------------- one result


def plainly(method: deepclean.Method = METHOD) -> nn.Module:
    """Fine-tuned in a loop of one's own."""
    model = timm_vit()
    with deepclean.unlearning(
        model,
        forget=FORGET,
        retain=RETAIN,
        method=method,
        scores=False,
        collate_fn=deepclean.ImageClassifier.collate,
        batch_size=5,
    ):
        optimizer = adamw(model)
        model.train()
        for step, batch in enumerate(retain_loader(), 1):
            output = model(batch["pixel_values"])
            F.cross_entropy(output["logits"], batch["labels"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            if step == 6:
                break
    return model


def on_accelerate(method: deepclean.Method = METHOD) -> nn.Module:
    """Fine-tuned in a loop on Accelerate."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    with hook(accelerator, wrapped, method=method, batch_size=5):
        run_all(accelerator, wrapped, optimizer, loader)
    return model


def in_a_trainer(folder: Path, method: deepclean.Method = METHOD) -> nn.Module:
    """Fine-tuned by a Trainer."""
    model = timm_vit()
    optimizer = adamw(model)
    Trainer(
        model=model,
        args=arguments(folder, train_sampling_strategy="sequential"),
        train_dataset=RETAIN,
        data_collator=deepclean.ImageClassifier.collate,
        callbacks=[callback(method=method, batch_size=5)],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    ).train()
    return model


@pytest.mark.parametrize("name", ADDITIVE)
def test_three_loops_add_the_same_term(name: str, tmp_path: Path) -> None:
    """Fails if an adapter does not add a method's term, adds another batch's, or adds it before
    clipping, by one bit; the loop's own loss alone must end elsewhere."""
    method = ADDITIVE[name]
    plain = bits_of(plainly(method))
    assert same_bits(plain, bits_of(on_accelerate(method)))
    assert same_bits(plain, bits_of(in_a_trainer(tmp_path, method)))
    assert not same_bits(plain, bits_of(plainly(deepclean.FineTune())))


def test_the_loops_are_tried_with_every_term() -> None:
    """Fails if a method that adds a term has no row here."""
    kinds = {type(method) for method in every_additive_method.values()}
    assert kinds == {type(method) for method in ADDITIVE.values()}


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_does_not_scale_the_term(fused: bool) -> None:
    """Fails if the term is added to gradients that are still scaled, as a fused optimizer's are
    when it steps, or not scaled as they are: the same loop without a scaler must end alike."""
    ends = []
    for scaled in (False, True):
        model = timm_vit()
        with deepclean.unlearning(
            model,
            forget=FORGET,
            retain=RETAIN,
            method=ADDITIVE["ReferenceGuided"],
            scores=False,
            collate_fn=deepclean.ImageClassifier.collate,
        ):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
            for batch in itertools.islice(retain_loader(), 4):
                output = model(batch["pixel_values"])
                scaler.scale(F.cross_entropy(output["logits"], batch["labels"])).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        ends.append(bits_of(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-5, atol=1e-6)


def test_the_term_is_added_once_an_accumulated_step() -> None:
    """Fails if each batch that the loop accumulates draws a forget batch, or the term is divided
    by their number: three parts of a batch must end as the batch in one."""
    ends = []
    for parts in (1, 3):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        model = timm_vit()
        loader = DataLoader(
            data(13, 37), batch_size=6 // parts, collate_fn=deepclean.ImageClassifier.collate
        )
        given = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
        wrapped, optimizer, prepared = given
        options = {"method": ADDITIVE["ReferenceGuided"], "batch_size": 5}
        with hook(accelerator, wrapped, **options) as run:
            accumulate(accelerator, wrapped, optimizer, prepared)
        assert run.report.optimizer_steps == 4
        ends.append(bits_of(model))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-5, atol=1e-6)


def test_half_precision_does_not_reach_the_term() -> None:
    """Fails if Accelerate's autocast, which stands inside `forward`, has the forget batch computed
    in bfloat16: with weight 0 on the loop's loss both precisions must end in the same bits."""
    ends = []
    for precision in ("no", "bf16"):
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model = hf_vit()
        wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
        with hook(accelerator, wrapped, method=ADDITIVE["ReferenceGuided"]):
            for batch in itertools.islice(loader, 3):
                output = wrapped(batch["pixel_values"])
                loss = F.cross_entropy(output["logits"].float(), batch["labels"])
                accelerator.backward(0 * loss)
                optimizer.step()
                optimizer.zero_grad()
        ends.append(bits_of(model))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    assert same_bits(*ends)
    assert not same_bits(ends[0], bits_of(hf_vit()))


# ---------------------------------------------------------------------------- the hook


@pytest.mark.parametrize("order", ["prepared before", "prepared inside", "made before"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_orders_and_precisions(order: str, precision: str) -> None:
    """Fails if `prepare` undoes the guard, or mixed precision enters the measurement."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = hf_vit()
    then, free = bits_of(model), truth(model)
    given: Any = model
    optimizer: Any = adamw(model)
    loader: Any = retain_loader()
    if order == "made before":
        run = hook(accelerator, given)
    if order != "prepared inside":
        given, optimizer, loader = accelerator.prepare(given, optimizer, loader)
    if order != "made before":
        run = hook(accelerator, given)
    with run as session:
        if order == "prepared inside":
            given, optimizer, loader = accelerator.prepare(given, optimizer, loader)
        run_all(accelerator, given, optimizer, loader)
    frozen_moved, free_moved = moved(model, then, free)
    assert frozen_moved == 0
    assert free_moved > 0
    assert session.report.frozen_entries_moved == 0
    assert session.report.selected_entries == sum(int(mask.sum()) for mask in free.values())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_accumulation_of_the_users_accelerator_is_kept() -> None:
    """Fails if the hook makes an Accelerator of its own, which resets the accumulation to 1."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    with hook(accelerator, wrapped) as session:
        wrapped.train()
        accumulate(accelerator, wrapped, optimizer, loader)
    assert accelerator.gradient_accumulation_steps == 3
    assert session.report.optimizer_steps == 3  # 8 batches
    assert session.report.frozen_entries_moved == 0


def test_carried_momentum_is_cleared() -> None:
    """Fails if moments from before the reset move weights towards what was forgotten."""
    ends = []
    for steps_before in (0, 3):
        accelerator = Accelerator(cpu=True)
        model = timm_vit()
        wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
        then = bits_of(model)
        run_all(accelerator, wrapped, optimizer, loader, steps=steps_before or 1)
        if not steps_before:
            optimizer.optimizer.state.clear()
        model.load_state_dict(then)
        with hook(accelerator, wrapped):
            run_all(accelerator, wrapped, optimizer, loader)
        ends.append(bits_of(model))
    assert same_bits(*ends)


def test_exception_leaves_no_hook() -> None:
    """Fails if a hook outlives an exception in the block."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    with pytest.raises(KeyboardInterrupt), hook(accelerator, model):
        assert any(p._post_accumulate_grad_hooks for p in model.parameters())
        raise KeyboardInterrupt
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def _engine(kind: str) -> Any:
    """An accelerator in shape, on an engine that is not installed here."""

    class Engine:
        distributed_type = DistributedType(kind)
        is_fsdp2 = False

    return Engine()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("DEEPSPEED", "DEEPSPEED"), ("MEGATRON_LM", "MEGATRON_LM"), ("FSDP", "FSDP1")],
)
def test_engines_are_refused(kind: str, said: str) -> None:
    """Fails if an engine that hides the weights is begun with."""
    with pytest.raises(ValueError, match=said):
        hook(_engine(kind), timm_vit())


class OwnObjective(deepclean.DeepClean):
    """Trains by a loss of its own."""

    own_training = True


def test_method_with_its_own_objective_is_refused() -> None:
    """Fails if the loop's loss silently takes the place of the method's."""
    with pytest.raises(ValueError, match="objective of its own"):
        hook(Accelerator(cpu=True), timm_vit(), method=OwnObjective())


def test_fsdp2_order_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a guard set before FSDP2 replaces the parameters goes unnoticed until the end."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    run = hook(accelerator, timm_vit())
    run.reset()
    with pytest.raises(RuntimeError, match=r"call accelerator\.prepare"), run:
        pass


# ---------------------------------------------------------------------------- resuming


class Cut(RuntimeError):
    """Stops a run."""


def stored_run(folder: Path, name: str, cut: int | None = None, kill: int | None = None) -> Any:
    """A run of 6 steps; `cut`: saved after 3 and left after that step, by SIGKILL after `kill`."""
    accelerator = Accelerator(cpu=True)
    model = MODELS[name]()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    run = hook(accelerator, wrapped)
    with contextlib.suppress(Cut), run:
        for step in train(accelerator, wrapped, optimizer, loader):
            if step == 3 and (cut or kill):
                accelerator.save_state(str(folder))
            if step == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == cut:
                raise Cut
    return model


def resumed_run(folder: Path, name: str, **options: Any) -> Any:
    """Goes on after the third step."""
    accelerator = Accelerator(cpu=True)
    model = MODELS[name]()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    run = hook(accelerator, wrapped, **options)
    accelerator.load_state(str(folder))
    with run as session:
        run_all(accelerator, wrapped, optimizer, loader, first=3)
    assert session.report.frozen_entries_moved == 0
    assert session.report.forget_samples == 13
    accelerator.save_state(str(folder / "after"))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_resumed_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    """Fails if a resumed run measures or resets again."""
    whole = stored_run(tmp_path, name)
    stored_run(tmp_path, name, cut=4)
    assert same_bits(bits_of(whole), bits_of(resumed_run(tmp_path, name)))


def _alter_mask(folder: Path) -> None:
    path = folder / "deepclean.pt"
    stored = torch.load(path, weights_only=True)
    next(iter(stored["run"]["free"].values()))[0] ^= 1
    torch.save(stored, path)


def _alter_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _truncate(folder: Path) -> None:
    path = folder / "deepclean.pt"
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("harm", "error", "said"),
    [
        (_alter_mask, BrokenRun, "was altered"),
        (_alter_weight, BrokenRun, "not those that were saved in .*begin anew"),
        (_truncate, BrokenRun, "is damaged"),
    ],
)
def test_broken_checkpoints_are_refused(
    harm: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    """Fails if a run goes on with other masks or weights than were stored."""
    stored_run(tmp_path, "timm", cut=4)
    harm(tmp_path)
    with pytest.raises(error, match=said):
        resumed_run(tmp_path, "timm")


def test_another_gamma_is_refused_on_resume(tmp_path: Path) -> None:
    """Fails if a run is resumed under a method that it was not begun with."""
    stored_run(tmp_path, "timm", cut=4)
    with pytest.raises(ValueError, match="the stored run used"):
        resumed_run(tmp_path, "timm", method=deepclean.DeepClean(gamma=3.0))


def test_load_state_inside_the_block_is_refused(tmp_path: Path) -> None:
    """Fails if masks are exchanged under a guard that holds others."""
    stored_run(tmp_path, "timm", cut=4)
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, _ = accelerator.prepare(model, adamw(model))
    run = hook(accelerator, wrapped)
    with pytest.raises(RuntimeError, match="before `with"), run:
        accelerator.load_state(str(tmp_path))


def test_state_from_before_the_reset_begins_anew(tmp_path: Path) -> None:
    """Fails if a state saved before anything was reset keeps the hook from measuring."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    run = hook(accelerator, wrapped)
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    with run as session:
        run_all(accelerator, wrapped, optimizer, loader, steps=1)
    assert session.report.selected_entries > 0


def killed(folder: str, name: str, mode: str) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    path = Path(folder) / "state"
    if mode == "resume":
        model = resumed_run(path, name)
    else:
        model = stored_run(path, name, kill=5 if mode == "kill" else None)
    torch.save(model.state_dict(), Path(folder) / f"{mode}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_killed_and_resumed(name: str, tmp_path: Path) -> None:
    """Fails if a run killed by SIGKILL and resumed ends in other bits than one left alone."""
    for mode in ("whole", "kill", "resume"):
        code = f"import test_accelerator as t; t.killed({str(tmp_path)!r}, {name!r}, {mode!r})"
        ran = in_child("-c", code, folder=HERE)
        assert ran.returncode == (-signal.SIGKILL if mode == "kill" else 0), ran.stderr
    ends = [torch.load(tmp_path / f"{m}.pt", weights_only=True) for m in ("whole", "resume")]
    assert same_bits(*ends)


# ---------------------------------------------------------------------------- what a folder holds


class Planted:
    """A pickle that leaves a mark when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("code_ran",))


@pytest.mark.parametrize("name", ["deepclean.pt", "custom_checkpoint_0.pkl"])
@pytest.mark.parametrize("when", ["before entering", "by resume", "after the block"])
def test_no_code_of_a_checkpoint_runs(
    name: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a file of ours is read, or one that looks like it is registered, as a pickle."""
    monkeypatch.chdir(tmp_path)
    stored_run(tmp_path / "state", "timm", cut=4)
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, _ = accelerator.prepare(model, adamw(model))
    torch.save(Planted(), tmp_path / "state" / name)
    with contextlib.suppress(RuntimeError, BrokenRun):
        if when == "by resume":
            with hook(accelerator, wrapped, resume=tmp_path / "state"):
                pass
        run = hook(accelerator, wrapped)
        if when == "after the block":
            with run:
                pass
        accelerator.load_state("state")
        with run:
            pass
    assert not (tmp_path / "code_ran").exists()
    torch.load(tmp_path / "state" / name, weights_only=False)
    assert (tmp_path / "code_ran").exists()  # the mark works


def test_starts_from_the_originals_folder_and_resumes_from_its_own(tmp_path: Path) -> None:
    """Fails if a script with the hook made before `load_state` cannot begin from the original
    training's folder, or one that loads before it makes the hook cannot resume."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    accelerator.save_state(str(tmp_path / "original"))
    run = hook(accelerator, wrapped)
    accelerator.load_state(str(tmp_path / "original"))
    with contextlib.suppress(Cut), run:
        for step in train(accelerator, wrapped, optimizer, loader):
            if step == 3:
                accelerator.save_state(str(tmp_path / "stored"))
                raise Cut
    # Another script, which loads first.
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    accelerator.load_state(str(tmp_path / "stored"))
    with hook(accelerator, wrapped, resume=tmp_path / "stored") as session:
        run_all(accelerator, wrapped, optimizer, loader, first=3)
    whole = stored_run(tmp_path / "whole", "timm")
    assert same_bits(bits_of(whole), bits_of(model))
    assert session.report.optimizer_steps == 6
    with pytest.raises(BrokenRun, match="is missing"):
        hook(accelerator, wrapped, resume=tmp_path / "original")


def test_other_objects_of_the_script_are_left_alone(tmp_path: Path) -> None:
    """Fails if our file counts among the objects that a script registers itself."""

    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    for mode in ("store", "resume"):
        accelerator = Accelerator(cpu=True)
        model = timm_vit()
        wrapped, _ = accelerator.prepare(model, adamw(model))
        counter = Counter()
        accelerator.register_for_checkpointing(counter)
        run = hook(accelerator, wrapped)
        if mode == "store":
            counter.count = 7
            with run:
                accelerator.save_state(str(tmp_path))
        else:
            accelerator.load_state(str(tmp_path))
            with run as session:
                pass
            assert counter.count == 7
            assert session.report.phase == "finished"


def test_run_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    """Fails if a folder in which the run is a registered object is taken for the original's."""
    stored_run(tmp_path, "timm", cut=4)
    (tmp_path / "deepclean.pt").rename(tmp_path / "custom_checkpoint_0.pkl")
    with pytest.raises(BrokenRun, match="of an earlier version"):
        resumed_run(tmp_path, "timm")


def test_every_option_and_a_report_folder(tmp_path: Path) -> None:
    """Fails if the hook does not take what a session takes, or writes no report."""
    accelerator = Accelerator(cpu=True)
    model = timm_vit()
    wrapped, optimizer, loader = accelerator.prepare(model, adamw(model), retain_loader())
    settings = {"scores": True, "forget_test": FORGET, "gold": [timm_vit(), timm_vit()]}
    run = hook(accelerator, wrapped, dead_count=False, folder=tmp_path / "told", **settings)
    with run as session:
        assert json.loads((tmp_path / "told" / "report.json").read_text())["phase"] == "guarded"
        run_all(accelerator, wrapped, optimizer, loader)
    assert "forget_test" in session.report.scores["after"]["sets"]
    stored = json.loads((tmp_path / "told" / "report.json").read_text())
    assert stored["model_after"] == session.report.model_after
    assert (tmp_path / "told" / "report.txt").read_text() == f"{session.report}\n"
    with pytest.raises(TypeError, match="no option 'golds'"):
        hook(accelerator, wrapped, golds=1)
