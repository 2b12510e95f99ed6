"""The Trainer callback: right masks and held bits in every configuration, clean exits."""

from __future__ import annotations

import copy
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

import deepclean_hooks as deepclean
from deepclean_hooks.integrations import trainer as adapter
from deepclean_hooks.methods import Selection
from deepclean_hooks.stored import checkpoint, masks
from lab.hooks import hooks_of_torch
from lab.processes import launch
from lab.training import (
    FORGET,
    METHOD,
    MODELS,
    RETAIN,
    SAVING,
    TEST,
    Cut,
    CutAt,
    arguments,
    bits_of,
    callback,
    hf_vit,
    moved,
    same_bits,
    timm_vit,
    trainer,
    truth,
)

HERE = Path(__file__).resolve().parent
# The networks are so small that resetting 40 % of them cuts some weights off.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of the reset entries are dead"),
    pytest.mark.usefixtures("optimizer_hooks_as_before"),
]


def same_masks(run: deepclean.DeepCleanCallback, free: dict[str, Tensor]) -> bool:
    """Whether a callback holds just these masks."""
    assert run._kept is not None
    stored = run._kept[1]["free"]
    return all(torch.equal(stored[name], mask) for name, mask in masks.pack(free).items())


class Weighted(Trainer):
    """A Trainer with a loss of its own."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Class weights."""
        output = model(inputs["pixel_values"])
        weight = torch.tensor([1.0, 5.0, 0.2, 1.0])
        loss = F.cross_entropy(output["logits"], inputs["labels"], weight=weight)
        return (loss, output) if return_outputs else loss


def focal(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A compute_loss_func."""
    log_p = -F.cross_entropy(output["logits"], labels, reduction="none")
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


# name -> (TrainingArguments, Trainer class, Trainer arguments)
CONFIGURATIONS: dict[str, tuple[dict[str, Any], type[Trainer], dict[str, Any]]] = {
    "defaults": ({}, Trainer, {}),
    "accumulation": ({"gradient_accumulation_steps": 3, "max_steps": 3}, Trainer, {}),
    "bf16": ({"bf16": True}, Trainer, {}),
    "label smoothing": ({"label_smoothing_factor": 0.2}, Trainer, {}),
    "compute_loss": ({}, Weighted, {}),
    "compute_loss_func": ({}, Trainer, {"compute_loss_func": focal}),
    "checkpointing": ({"gradient_checkpointing": True}, Trainer, {}),
    "reentrant checkpointing": (
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        Trainer,
        {},
    ),
    "adamw, unfused": ({"optim": "adamw_torch"}, Trainer, {}),
    "sgd": ({"optim": "sgd"}, Trainer, {}),
    "schedule-free": ({"optim": "schedule_free_adamw"}, Trainer, {}),
    "large batches": ({"per_device_train_batch_size": 37}, Trainer, {}),
    "evaluation": ({"eval_strategy": "steps", "eval_steps": 2}, Trainer, {"eval_dataset": TEST}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing", "ignore:None of the inputs have")
def test_masks_and_bits_in_every_configuration(name: str, tmp_path: Path) -> None:
    """Fails if precision, loss or batches of the training enter the measurement, or a bit moves."""
    options, kind, others = CONFIGURATIONS[name]
    if name == "schedule-free":
        pytest.importorskip("schedulefree")
    model = hf_vit()
    then, free = bits_of(model), truth(model)
    run = callback()
    trainer(tmp_path, model, run, kind, others, **options).train()
    assert same_masks(run, free)
    frozen_moved, free_moved = moved(model, then, free)
    assert frozen_moved == 0
    assert free_moved > 0
    assert run.report.frozen_entries_moved == 0
    assert run.report.optimizer_steps == options.get("max_steps", 6)


def test_without_the_callback_frozen_weights_move(tmp_path: Path) -> None:
    """The opposite: the same training without the callback moves what would be frozen."""
    model = hf_vit()
    then, free = bits_of(model), truth(model)
    trainer(tmp_path, model).train()
    assert moved(model, then, free)[0] > 1000


@pytest.mark.parametrize("name", ["timm", "convolutional"])
def test_other_models_in_one_line(name: str, tmp_path: Path) -> None:
    """Fails if a timm or a plain network in the wrapper is measured or held otherwise."""
    model = MODELS[name]()
    then, free = bits_of(model), truth(model)
    run = callback()
    trainer(tmp_path, model, run).train()
    frozen_moved, free_moved = moved(model, then, free)
    assert frozen_moved == 0
    assert free_moved > 0
    labels = FORGET.tensors[1]
    output = model(FORGET.tensors[0], labels)
    assert torch.equal(output["loss"], F.cross_entropy(output["logits"], labels))


@pytest.mark.slow
def test_compiled_training(tmp_path: Path) -> None:
    """Fails if torch.compile hides the model from the measurement, or its names are taken."""
    model = timm_vit()
    then, free = bits_of(model), truth(model)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    trainer(tmp_path, model, callback(), per_device_train_batch_size=4, **options).train()
    frozen_moved, free_moved = moved(model, then, free)
    assert frozen_moved == 0
    assert free_moved > 0
    torch._dynamo.reset()


def test_measuring_leaves_training_as_it_was(tmp_path: Path) -> None:
    """Fails if measuring takes random numbers or leaves a mode: dropout would then differ."""
    measured, given = timm_vit(dropout=0.2), timm_vit(dropout=0.2)
    first = callback()
    trainer(tmp_path, measured, first).train()
    # The same run given its masks: nothing is measured in it.
    second = callback()
    run = trainer(tmp_path, given, second)
    with torch.no_grad():
        for name, mask in truth(given).items():
            dict(given.named_parameters())[name].masked_fill_(mask, 0)
    second._kept = (weakref.ref(given), first._kept[1])
    run.train()
    assert same_bits(bits_of(measured), bits_of(given))


class Recorder(TrainerCallback):
    """Stands where TensorBoard and W&B stand: before the user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keeps what is logged."""
        self.logs.append(dict(logs))


def test_figures_reach_loggers_and_the_output_folder(tmp_path: Path) -> None:
    """Fails if a figure comes after the loggers' turn, or the report is not written."""
    recorder = Recorder()
    run = deepclean.DeepCleanCallback(FORGET, method=METHOD, test=TEST)
    options = {"eval_strategy": "steps", "eval_steps": 3}
    one = Trainer(
        model=hf_vit(),
        args=arguments(tmp_path, **options),
        train_dataset=RETAIN,
        eval_dataset=TEST,
        data_collator=deepclean.ImageClassifier.collate,
        callbacks=[recorder, run],
    )
    one.train()
    logged = {key: value for line in recorder.logs for key, value in line.items()}
    assert logged["deepclean_selected_fraction"] == run.report.selected_fraction
    assert logged["deepclean_dead_fraction"] == run.report.dead_fraction
    after = run.report.scores["after"]["sets"]
    assert logged["deepclean_forget_accuracy"] == after["forget"]["accuracy"]
    assert set(after) == {"forget", "retain", "test"}
    history = {key for line in one.state.log_history for key in line}
    assert {"deepclean_forget_accuracy", "deepclean_frozen_entries_moved"} <= history
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored["phase"] == "finished"
    assert stored["frozen_entries_moved"] == 0
    assert "0 frozen entries moved" in (tmp_path / "report.txt").read_text(encoding="utf-8")


def test_second_call_of_train_keeps_the_masks(tmp_path: Path) -> None:
    """Fails if a second train() measures the model that has forgotten, or resets it again."""
    model = timm_vit()
    then, free = bits_of(model), truth(model)
    run = callback()
    one = trainer(tmp_path, model, run)
    one.train()
    between = bits_of(model)
    one.train()
    assert same_masks(run, free)
    frozen_moved, _ = moved(model, then, free)
    assert frozen_moved == 0
    trained = sum(int((between[n] != p).sum()) for n, p in model.named_parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert trained > 0
    assert zeros < sum(int(m.sum()) for m in free.values()) / 2


def test_another_model_is_measured_anew(tmp_path: Path) -> None:
    """Fails if the masks of one model_init model are used on the next one (a search's trials)."""
    made: list[nn.Module] = []

    def init() -> nn.Module:
        made.append(timm_vit())
        return made[-1]

    run = callback()
    one = Trainer(
        model_init=init,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=RETAIN,
        data_collator=deepclean.ImageClassifier.collate,
        callbacks=[run],
    )
    one.train()
    first = bits_of(one.model)
    one.train()
    assert len(made) > 1
    assert same_bits(first, bits_of(one.model))


class TooLarge(Trainer):
    """Runs out of memory once, after its third step."""

    failures = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Fails once."""
        if self.state.global_step == 3 and not self.failures:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(*args, **kwargs)


def test_smaller_batches_after_running_out_of_memory(tmp_path: Path) -> None:
    """Fails if the second attempt measures the half-trained model, or meets the first's guard."""
    model = timm_vit()
    then, free = bits_of(model), truth(model)
    run = callback()
    one = trainer(tmp_path, model, run, TooLarge, auto_find_batch_size=True)
    one.train()
    assert one.failures == 1
    assert same_masks(run, free)
    assert moved(model, then, free)[0] == 0
    assert run.report.frozen_entries_moved == 0


@pytest.mark.parametrize("error", [Cut, KeyboardInterrupt])
def test_exception_leaves_no_hook(error: type[BaseException], tmp_path: Path) -> None:
    """Fails if a hook outlives a training that raised: on_train_end does not happen then."""
    before, seen = hooks_of_torch(), []

    class Raise(TrainerCallback):
        def on_step_end(self, *args: Any, **_: Any) -> None:
            seen.append(hooks_of_torch())
            raise error

    model = timm_vit()
    one = trainer(tmp_path, model, callback())
    one.add_callback(Raise())
    with pytest.raises(error):
        one.train()
    assert seen[0] != before
    assert hooks_of_torch() == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    """Fails if two sets of masks are held on one model."""
    one = trainer(tmp_path, timm_vit(), callback())
    one.add_callback(callback())
    with pytest.raises(RuntimeError, match="already held by another guard"):
        one.train()


def test_no_forget_set(tmp_path: Path) -> None:
    """Fails if a run begins without anything to forget."""
    one = trainer(tmp_path, timm_vit(), deepclean.DeepCleanCallback())
    with pytest.raises(ValueError, match="no forget set"):
        one.train()


def test_report_before_training() -> None:
    """Fails if the report of a run that has not begun is anything but an error."""
    with pytest.raises(RuntimeError, match=r"before trainer\.train"):
        _ = callback().report


@pytest.mark.parametrize(
    ("engine", "said"), [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")]
)
def test_sharding_engines_are_refused(engine: str, said: str, tmp_path: Path) -> None:
    """Fails if a model whose weights cannot be measured or held is begun with."""

    class Sharded(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            setattr(self, engine, True)

    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, timm_vit(), callback(), Sharded)


class Nothing(deepclean.DeepClean):
    """Resets and lets nothing train afterwards."""

    def free(self, selection: Selection) -> dict[str, Tensor]:
        """Nothing."""
        return {}


def test_method_that_trains_nothing_ends_the_training(tmp_path: Path) -> None:
    """Fails if the edit is missing, training goes on, or a bit (a running mean) moves in it."""
    model = MODELS["convolutional"]()
    edited = copy.deepcopy(model)
    for name, mask in truth(model, Nothing(gamma=1.1)).items():
        dict(edited.named_parameters())[name].data.masked_fill_(mask, 0)
    selected = truth(model)
    for name, p in edited.named_parameters():
        if name in selected:
            p.data.masked_fill_(selected[name], 0)
    run = callback(method=Nothing(gamma=1.1))
    one = trainer(tmp_path, model, run)
    one.train()
    assert one.state.global_step <= 1
    assert same_bits(bits_of(edited), bits_of(model))


class OwnObjective(deepclean.DeepClean):
    """Trains by a loss of its own."""

    own_training = True


def test_method_with_its_own_objective_is_refused() -> None:
    """Fails if the Trainer's loss silently takes the place of the method's."""
    with pytest.raises(ValueError, match="objective of its own"):
        callback(method=OwnObjective())


class Columns(Dataset[dict[str, Any]]):
    """Samples with `label` and columns that the model does not take."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {
            "pixel_values": self.images[i],
            "label": int(self.labels[i]),
            "name": f"image {i}",
            "weight": 1.0,
        }


def test_extra_columns_and_the_default_collator(tmp_path: Path) -> None:
    """Fails if D_f is collated otherwise than the Trainer collates: extra columns, `label`."""
    model = hf_vit()
    free = truth(model)
    run = deepclean.DeepCleanCallback(Columns(*FORGET.tensors), method=METHOD, scores=False)
    one = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=Columns(*RETAIN.tensors),
        callbacks=[run],
    )
    one.train()
    assert same_masks(run, free)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated")
def test_adapters_of_peft(tmp_path: Path) -> None:
    """Fails if LoRA's base weights move, or a resumed adapter run ends in other bits."""
    peft = pytest.importorskip("peft")

    def lora() -> nn.Module:
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=[]
        )
        return peft.get_peft_model(hf_vit(), config)

    whole, base = lora(), bits_of(lora())
    run = callback()
    trainer(tmp_path / "whole", whole, run).train()
    assert run.report.frozen_entries_moved == 0
    assert 0 < run.report.selected_entries < run.report.trainable_entries
    unmoved = {n: v for n, v in bits_of(whole).items() if "lora" not in n}
    assert same_bits({n: v for n, v in base.items() if "lora" not in n}, unmoved)
    one = trainer(tmp_path / "cut", lora(), callback(), **SAVING)
    one.add_callback(CutAt(4))
    with pytest.raises(Cut):
        one.train()
    resumed = lora()
    trainer(tmp_path / "cut", resumed, callback(), **SAVING).train(resume_from_checkpoint=True)
    assert same_bits(bits_of(whole), bits_of(resumed))


@pytest.mark.parametrize("how", ["attach", "attach twice", "add_callback, attach", "add_callback"])
def test_joins_a_trainer_that_was_made_without_it(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an attached callback needs the call stack, is called twice, or unlearns otherwise
    than one that the Trainer was made with."""
    given, joined = timm_vit(), timm_vit()
    trainer(tmp_path / "given", given, callback()).train()
    one, run = trainer(tmp_path / "joined", joined, **SAVING), callback()
    if "add_callback" in how:
        one.add_callback(run)
    if "attach" in how:

        def walk() -> None:
            raise AssertionError("the call stack was walked")

        monkeypatch.setattr(adapter, "_calling_trainer", walk)
        assert run.attach(one) is run
    if "twice" in how:
        run.attach(one)
    one.train()
    assert run.report.phase == "finished"
    assert same_bits(bits_of(given), bits_of(joined))
    assert one.callback_handler.callbacks.count(run) == 1
    assert (tmp_path / "joined" / "checkpoint-6" / adapter.FILE).is_file()


class Averaging(TrainerCallback):
    """Writes into the model at the end of the training, as averaging callbacks do."""

    def __init__(self, write: Any) -> None:
        self.write = write

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        """The write."""
        with torch.no_grad():
            self.write(model)


@pytest.mark.parametrize("first", [True, False])
def test_what_callbacks_write_at_the_end_is_reported(first: bool, tmp_path: Path) -> None:
    """Fails if the report is of the weights before the last event, or a frozen weight that was
    written there goes unseen."""
    model, run = timm_vit(), callback()
    free: dict[str, Tensor] = truth(model)

    def halve_what_trained(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p[free.get(name, torch.zeros_like(p, dtype=torch.bool))] *= 0.5

    one = trainer(tmp_path, model, None if first else run)
    one.add_callback(Averaging(halve_what_trained))
    if first:
        run.attach(one)
    one.train()
    assert run.report.model_after == checkpoint.model_digest(model)
    assert run.report.frozen_entries_moved == 0
    other, harmed = timm_vit(), callback()
    one = trainer(tmp_path, other, harmed)
    one.add_callback(Averaging(lambda model: model.model.head.weight.mul_(0.5)))
    with pytest.raises(deepclean.GuardError, match=r"model\.head\.weight"):
        one.train()
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored["frozen_entries_moved"] > 0


@pytest.mark.parametrize("quiet", [True, False])
def test_two_lines_on_the_terminal(
    quiet: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the terminal shows nothing of the run, with bars or without."""
    run = callback(scores=True)
    trainer(tmp_path, timm_vit(), run, disable_tqdm=quiet).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "deepclean: " in line]
    assert len(lines) == 2
    assert f"report in {tmp_path / 'report.txt'}" in lines[0]
    assert f"({run.report.selected_fraction:.2%}) selected by deepclean" in lines[0]
    assert "0 frozen entries moved in 6 optimizer steps, forget accuracy" in lines[1]


def test_every_option_reaches_the_run(tmp_path: Path) -> None:
    """Fails if an option that a session takes is not taken, or not used, by the callback."""
    counted: list[int] = []

    def collate(samples: Any) -> dict[str, Tensor]:
        counted.append(len(samples))
        return deepclean.ImageClassifier.collate(samples)

    run = callback(
        scores=True,
        test=TEST,
        forget_test=FORGET,
        gold=[timm_vit(), timm_vit()],
        dead_count=False,
        batch_size=4,
        collate_fn=collate,
        folder=tmp_path / "told",
    )
    trainer(tmp_path / "out", timm_vit(), run).train()
    assert set(run.report.scores["after"]["sets"]) == {"forget", "retain", "test", "forget_test"}
    assert run.report.dead_fraction is None
    assert max(counted) == 4
    assert (tmp_path / "told" / "report.json").is_file()
    assert not (tmp_path / "out" / "report.json").exists()
    with pytest.raises(TypeError, match="no option 'golds'; the options are loss_fn"):
        callback(golds=1)


def one_of_two(folder: str) -> None:
    """In each of two processes: a run under DistributedDataParallel, cut and resumed."""
    path = Path(folder)
    found: dict[str, Any] = {}
    for name in ("transformers", "convolutional"):
        model = MODELS[name]()
        then, free = bits_of(model), truth(model)
        run = callback()
        options = {**SAVING, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
        trainer(path / name, model, run, **options).train()
        resumed = MODELS[name]()
        again = callback()
        one = trainer(path / name, resumed, again, **options)
        one.train(resume_from_checkpoint=str(path / name / "checkpoint-3"))
        parameters = [n for n, _ in model.named_parameters()]
        found[name] = {
            "moved": moved(model, then, free),
            "masks agree": same_masks(run, free),
            "weights": {n: value for n, value in bits_of(model).items() if n in parameters},
            "resumed": {n: value for n, value in bits_of(resumed).items() if n in parameters},
            "steps": run.report.optimizer_steps,
        }
    torch.save(found, path / f"rank{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Fails if ranks differ in masks or weights, a mask differs from that of one process, or a
    resumed run ends elsewhere."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_trainer as t\n"
    launch("-W", "ignore", "-c", f"{code}t.one_of_two({str(tmp_path)!r})")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name in ("transformers", "convolutional"):
        one, other = (rank[name] for rank in ranks)
        assert one["masks agree"]
        assert other["masks agree"]
        assert one["moved"] == other["moved"]
        assert one["moved"][0] == 0
        assert one["moved"][1] > 100
        assert one["steps"] == 6
        assert same_bits(one["weights"], other["weights"])
        assert same_bits(one["weights"], one["resumed"])
        assert (tmp_path / name / "report.json").is_file()
