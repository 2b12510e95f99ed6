"""The session's phases: in order, each once; reset touches W_f alone; the frozen rest keeps its
bits; resume."""

import copy
import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.stored.bits import differing, digest
from deepclean_hooks.stored.checkpoint import model_digest
from lab.hooks import hooks_of_torch
from lab.sessions import FORGET, RETAIN, network, samples

GAMMA = 1.1


def session(model: nn.Module, **options: object) -> deepclean.Session:
    """A session without scores, which most tests do not need."""
    options = {"scores": False, "batch_size": 8, **options}
    return deepclean.Session(model, deepclean.DeepClean(gamma=GAMMA), **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(4)) -> None:
    """An ordinary loop in train mode: one batch of 8 a step."""
    model.train()
    for step in steps:
        x, y = (t[step % 4 * 8 :][:8] for t in RETAIN.tensors)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that moves every weight it owns, by decay alone."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_the_whole_way() -> None:
    """Fails if a phase changes what it may not: select anything, reset a frozen bit, training a
    frozen bit."""
    model = network()
    original = state(model)
    run = session(model).measure(FORGET, RETAIN)
    preview = run.select()
    assert preview.phase == "selected"
    assert preview.frozen_entries_moved is None
    assert 0 < preview.selected_fraction < 1
    assert not any(differing(p, original[n]).any() for n, p in state(model).items())

    masks = {n: m.clone() for n, m in run.selection.masks.items()}
    run.reset()
    for name, p in state(model).items():
        frozen = ~masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert not differing(p, original[name])[frozen].any()
        assert (p[~frozen] == 0).all()

    run.guard()
    train(model, adamw(model))
    report = run.finish()
    assert report.frozen_entries_moved == 0
    assert report.optimizer_steps == 4
    moved = 0
    for name, p in state(model).items():
        frozen = ~masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert not differing(p, original[name])[frozen].any()
        moved += int((p[~frozen] != 0).sum())
    assert moved > 0.9 * report.selected_entries


def test_the_digest_of_the_model_follows_from_those_of_its_tensors() -> None:
    """Fails if a figure of the report cannot be recomputed from its checkpoint: a digest over other
    tensors than a state_dict has, or one that does not see a bit, a name or a shape."""
    model = network()
    report = session(model).measure(FORGET, RETAIN).report
    lines = (f"{name}={value};" for name, value in sorted(report.checkpoint_before.items()))
    assert report.model_before == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert set(report.checkpoint_before) == set(model.state_dict())
    assert report.model_before == model_digest(network())
    model[1].running_mean[0] = 1e-42
    assert report.model_before != model_digest(model)
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.zeros(4)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(4)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "b": -torch.zeros(4)},
    ]
    assert digest(tensors) not in map(digest, others)


def test_without_the_guard_frozen_weights_move() -> None:
    """The opposite: the same loop without the session moves nearly every weight."""
    model = network()
    before = state(model)
    train(model, adamw(model))
    changed = sum(int(differing(p, before[n]).sum()) for n, p in state(model).items())
    assert changed > 0.9 * sum(p.numel() for p in model.parameters())


ORDER = ["measure", "select", "reset", "guard", "finish"]


def advance(run: deepclean.Session, call: str) -> None:
    """One phase."""
    if call == "measure":
        run.measure(FORGET, RETAIN)
    else:
        getattr(run, call)()


@pytest.mark.filterwarnings("ignore:no optimizer step of this model was seen:UserWarning")
@pytest.mark.parametrize("done", range(6))
@pytest.mark.parametrize("call", ORDER)
def test_phases_only_go_forward(done: int, call: str) -> None:
    """Fails if a phase runs out of order or twice, or the error does not name the order."""
    run = session(network())
    for phase in ORDER[:done]:
        advance(run, phase)
    try:
        if ORDER.index(call) == done:
            advance(run, call)
        else:
            with pytest.raises(
                RuntimeError, match="the order is measure -> select -> reset -> guard"
            ):
                advance(run, call)
    finally:
        run.close()


def test_report_is_complete_and_json() -> None:
    """Fails if a field that an auditor needs is missing, or does not survive JSON."""
    model = network()
    with deepclean.unlearning(
        model,
        forget=FORGET,
        retain=RETAIN,
        test=samples(20, 40),
        method=deepclean.DeepClean(gamma=GAMMA),
        batch_size=8,
    ) as run:
        train(model, adamw(model))
    told = json.loads(run.report.to_json())
    empty = [key for key, value in told.items() if value is None or value == {}]
    assert empty == ["tied", "gamma_choice"]  # no tensor is tied, gamma was given
    assert told["forget_samples"] == 8
    assert told["retain_samples"] == 32
    assert told["trainable_entries"] == sum(p.numel() for p in model.parameters())
    assert told["selected_entries"] == sum(layer["selected"] for layer in told["layers"])
    assert set(told["scores"]) == {"before", "after"}
    assert set(told["seconds"]) == {"fisher", "evaluate", "select", "reset", "dead", "fine-tune"}
    assert told["model_before"] != told["model_after"]
    text = str(run.report)
    for expected in ("0 frozen entries moved", "I_Df > 1.1 * I_Dr", "0.weight", "forget"):
        assert expected in text


def test_two_runs_end_in_the_same_bits() -> None:
    """Fails if anything in a run is not reproducible."""

    def run() -> dict[str, Tensor]:
        model = network()
        with deepclean.unlearning(
            model,
            forget=FORGET,
            retain=RETAIN,
            method=deepclean.DeepClean(gamma=GAMMA),
            scores=False,
        ):
            train(model, adamw(model))
        return state(model)

    one, other = run(), run()
    assert not any(differing(p, other[n]).any() for n, p in one.items())


def test_masks_do_not_depend_on_batches_or_order() -> None:
    """Fails if the selection changes with batch size, shuffling or drop_last."""

    def masks(loader: object) -> dict[str, Tensor]:
        run = session(network().double()).measure(double(FORGET), loader(double(RETAIN)))
        run.select()
        return run.selection.masks

    def double(data: TensorDataset) -> TensorDataset:
        return TensorDataset(data.tensors[0].double(), data.tensors[1])

    one = masks(lambda d: d)
    other = masks(lambda d: DataLoader(d, batch_size=5, shuffle=True, drop_last=True))
    assert all(torch.equal(m, other[n]) for n, m in one.items())


class Interrupted(Exception):
    """What a user's loop may raise."""


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_exception_in_the_loop_leaves_nothing(error: type[BaseException]) -> None:
    """Fails if an exception leaves a hook, or is swallowed."""
    model, before = network(), hooks_of_torch()
    with (
        pytest.raises(error),
        deepclean.unlearning(
            model,
            forget=FORGET,
            retain=RETAIN,
            method=deepclean.DeepClean(gamma=GAMMA),
            scores=False,
        ),
    ):
        assert hooks_of_torch() != before
        train(model, adamw(model), range(1))
        raise error
    assert hooks_of_torch() == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    frozen = state(model)
    train(model, adamw(model))
    assert any(differing(p, frozen[n]).all() for n, p in state(model).items())


@pytest.mark.filterwarnings("ignore:no optimizer step of this model was seen:UserWarning")
def test_nested_sessions_are_refused_before_anything_changes() -> None:
    """Fails if a second session resets a model that the first one holds."""
    model = network()
    with deepclean.unlearning(
        model, forget=FORGET, retain=RETAIN, method=deepclean.DeepClean(gamma=GAMMA), scores=False
    ):
        before = state(model)
        with pytest.raises(RuntimeError, match="already held by another guard"):
            session(model)
        assert not any(differing(p, before[n]).any() for n, p in state(model).items())


def test_overridden_step_is_told_and_held() -> None:
    """Fails if an optimizer that the hooks cannot see trains frozen weights, or the report does not
    say that there was one."""
    model = network()
    optimizer = adamw(model)
    step = (
        type(optimizer).step.__wrapped__ if hasattr(type(optimizer).step, "__wrapped__") else None
    )
    assert step is not None
    run = session(model).measure(FORGET, RETAIN)
    run.select()
    run.reset().guard()
    then = state(model)
    optimizer.step = lambda: step(optimizer)
    with pytest.warns(UserWarning, match="written outside the optimizer steps"):
        train(model, optimizer)
    with pytest.warns(UserWarning, match="written outside|no optimizer step was seen"):
        report = run.finish()
    assert hooks_of_torch() == ([], [])
    assert report.frozen_entries_moved == 0
    assert any("none of torch's" in warning for warning in report.warnings)
    for name, p in model.named_parameters():
        free = run.selection.masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert not (differing(p, then[name]) & ~free).any()


@pytest.mark.parametrize("steps", [1, 3])
def test_resume_ends_where_the_uninterrupted_run_ends(steps: int, tmp_path: Path) -> None:
    """Fails if a resumed run measures or resets again, or forgets the mask: then the bits
    differ."""
    method = deepclean.DeepClean(gamma=GAMMA)
    sets = {"forget": FORGET, "retain": RETAIN, "method": method, "scores": False}
    whole = network()
    with deepclean.unlearning(whole, **sets):
        train(whole, adamw(whole), range(5))

    model, file = network(), tmp_path / "checkpoint.pt"
    with pytest.raises(Interrupted), deepclean.unlearning(model, **sets) as run:
        optimizer = adamw(model)
        train(model, optimizer, range(steps))
        stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**stored, "run": run.state_dict()}, file)
        raise Interrupted

    checkpoint = torch.load(file, weights_only=True)
    model = network()
    model.load_state_dict(checkpoint["model"])
    with deepclean.unlearning(model, **sets, resume=checkpoint["run"]) as run:
        optimizer = adamw(model)
        optimizer.load_state_dict(checkpoint["optimizer"])
        train(model, optimizer, range(steps, 5))
    expected = whole.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    assert run.report.selected_entries > 0
    assert "fisher" in run.report.seconds


def stored_run() -> tuple[nn.Module, dict[str, object]]:
    """A model after the reset, and its session's state."""
    model = network()
    run = session(model).measure(FORGET, RETAIN)
    run.select()
    return model, run.reset().state_dict()


def test_resume_refuses_other_weights_and_other_methods() -> None:
    """Fails if a checkpoint that was loaded in part goes on training silently."""
    model, stored = stored_run()
    other = copy.deepcopy(model)
    other[0].bias.data[0] = 0.0  # was -0.0: one bit of one frozen entry
    with pytest.raises(ValueError, match="weights are not those that were stored with this run"):
        session(other).load_state_dict(stored)
    with pytest.raises(ValueError, match="the stored run used"):
        deepclean.Session(model, deepclean.DeepClean(gamma=3.0)).load_state_dict(stored)
    with pytest.raises(ValueError, match="which does not fit its shape"):
        wide = nn.Sequential(
            nn.Conv2d(1, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
        )
        session(wide).load_state_dict(stored)
    session(model).load_state_dict(stored)


@pytest.mark.parametrize("part", ["free", "report", "added", "model", None])
def test_resume_refuses_what_is_not_whole(part: str | None) -> None:
    """Fails if a state without one of its parts, or a path, ends in Python's own error."""
    model = network()
    run = session(model).measure(FORGET, RETAIN)
    run.select()
    stored = run.reset().state_dict()
    if part is None:
        with pytest.raises(TypeError, match=r"a dict; got 'run\.pt'; read it first"):
            session(model).load_state_dict("run.pt")
    else:
        del stored[part]
        with pytest.raises(ValueError, match=f"the stored run lacks {part}, so it is not whole"):
            session(model).load_state_dict(stored)


def test_state_before_the_reset_is_refused() -> None:
    """Fails if a state without a mask can be stored."""
    with pytest.raises(RuntimeError, match="can be stored from the reset on"):
        session(network()).measure(FORGET, RETAIN).state_dict()


def test_the_same_samples_in_both_sets() -> None:
    """Fails if forget samples that stay in the retain set pass, by index or by content."""
    everything = samples(0, 40)
    with pytest.raises(ValueError, match=r"8 samples stand in both .* indices \[0, 1, 2\]"):
        session(network()).measure(Subset(everything, range(8)), everything)
    with pytest.raises(ValueError, match="all 8 forget samples stand in the retain set too"):
        session(network()).measure(FORGET, samples(0, 40))
    with pytest.warns(UserWarning, match="2 of the 8 forget samples stand in the retain set"):
        run = session(network()).measure(FORGET, samples(6, 40))
    assert run.report.overlapping_samples == 2


def test_stored_diagonal_instead_of_the_retain_set() -> None:
    """Fails if a stored diagonal of D or of D_r gives another mask than measuring D_r, or a foreign
    one is taken."""
    model = network()
    direct = session(model).measure(FORGET, RETAIN)
    direct.select()
    d_r = deepclean.fisher_diagonal(model, RETAIN)
    for stored in (d_r, deepclean.fisher_diagonal(model, samples(0, 40))):
        run = session(model).measure(FORGET, stored)
        run.select()
        assert run.report.retain_samples == 32
        assert all(
            torch.equal(m, run.selection.masks[n]) for n, m in direct.selection.masks.items()
        )
    with pytest.raises(ValueError, match="5 of the 8 forget samples are in the stored diagonal"):
        session(model).measure(FORGET, deepclean.fisher_diagonal(model, samples(3, 40)))
    other = network()
    other[4].weight.data[0, 5] += 1e-6
    with pytest.raises(ValueError, match="the stored diagonal belongs to the model"):
        session(other).measure(FORGET, d_r)


class Block(nn.Sequential):
    """Convolution, BatchNorm, ReLU, three times: where a scale and a shift of 0 kill a channel."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(8 if i else 1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(288, 5))


def test_dead_entries_are_counted_and_warned_of() -> None:
    """Fails if the literal reading's dead channels go unseen; the default has next to none."""

    def dead(one_dimensional: bool) -> float:
        torch.manual_seed(0)
        method = deepclean.DeepClean(gamma=GAMMA, one_dimensional=one_dimensional)
        run = deepclean.Session(Block(), method, scores=False).measure(FORGET, RETAIN)
        run.select()
        return run.reset().report.dead_fraction

    with pytest.warns(UserWarning, match="of the reset entries are dead"):
        assert dead(one_dimensional=True) > 0.05
    assert dead(one_dimensional=False) < 0.01


def test_nothing_selected_is_warned_of() -> None:
    """Fails if a gamma that selects nothing passes for unlearning."""
    run = deepclean.Session(network(), deepclean.DeepClean(gamma=1e30), scores=False)
    with pytest.warns(UserWarning, match="no candidate entry was selected; lower gamma"):
        run.measure(FORGET, RETAIN).select()


def test_bad_settings_are_refused_at_once() -> None:
    """Fails if a wrong method, an unknown policy or a frozen model is found out after the
    measurement."""
    with pytest.raises(TypeError, match="method must be a method such as"):
        deepclean.Session(network(), "deepclean")
    with pytest.raises(ValueError, match="norm_statistics must be one of"):
        session(network(), norm_statistics="frozen")
    for scores in (True, False):
        with pytest.raises(TypeError, match=r"gold must be a model, .* got 'gold\.pt'; load"):
            session(network(), gold="gold.pt", scores=scores)
    with pytest.raises(ValueError, match="no trainable parameter"):
        session(network().requires_grad_(False))


def test_an_unknown_option_is_refused_with_the_options_there_are() -> None:
    """Fails if a misspelt option is swallowed, as a dict of options does by itself."""
    for name in ("scorse", "forgettest", "gamma"):
        with pytest.raises(TypeError, match=f"Session has no option '{name}'; .*forget_test, gold"):
            session(network(), **{name: True})
    with pytest.raises(TypeError, match="no option 'epochs', 'lr'"):
        session(network(), lr=1, epochs=2)


def test_without_the_dead_count_a_batch_is_tried_and_no_more() -> None:
    """Fails if `dead_count=False` is ignored: the count reads 8 batches of the retain set."""

    class Counted(torch.utils.data.Dataset):
        read = 0

        def __len__(self) -> int:
            return len(RETAIN)

        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            self.read += 1
            return RETAIN[index]

    def after_reset(**options: bool) -> tuple[int, float | None]:
        counted = Counted()
        run = session(network(), **options).measure(FORGET, counted)
        run.select()
        before = counted.read
        fraction = run.reset().report.dead_fraction
        return counted.read - before, fraction

    assert after_reset(dead_count=False) == (8, None)
    read, fraction = after_reset()
    assert read == 8 + len(RETAIN)
    assert fraction is not None


def test_norm_statistics_policy() -> None:
    """Fails if "freeze" lets a running statistic move, or "update" holds it."""

    def statistics(policy: str) -> tuple[Tensor, Tensor]:
        model = network()
        before = model[1].running_mean.clone()
        run = session(model, norm_statistics=policy).measure(FORGET, RETAIN)
        run.select()
        run.reset().guard()
        train(model, adamw(model))
        assert run.finish().norm_statistics == policy
        return before, model[1].running_mean

    assert torch.equal(*statistics("freeze"))
    assert not torch.equal(*statistics("update"))


def test_unlearn_trains_and_leaves_modes() -> None:
    """Fails if the recipe leaves the model in train mode, trains frozen weights, or takes 0
    epochs."""
    model = network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = deepclean.unlearn(
            model, FORGET, RETAIN, method=deepclean.DeepClean(gamma=GAMMA), epochs=2, batch_size=8
        )
    assert report.optimizer_steps == 8
    assert report.frozen_entries_moved == 0
    assert not any(m.training for m in model.modules())
    with pytest.raises(ValueError, match="epochs must be a positive whole number, got 0"):
        deepclean.unlearn(model, FORGET, RETAIN, method=deepclean.DeepClean(), epochs=0)


def test_custom_loss_without_logits() -> None:
    """Fails if batches of a form that only loss_fn knows cannot be unlearned, or if scores fail
    silently."""

    def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
        x, y, weight = batch
        return F.cross_entropy(model(x), y, reduction="none") * weight

    def weighted(data: TensorDataset) -> TensorDataset:
        return TensorDataset(*data.tensors, torch.ones(len(data)))

    run = deepclean.Session(network(), deepclean.DeepClean(gamma=GAMMA), loss_fn=loss_fn).measure(
        weighted(FORGET), weighted(RETAIN)
    )
    assert "not computed: a batch must be (x, y)" in run.report.scores["before"]
    run.select()
    plain = session(network()).measure(FORGET, RETAIN)
    plain.select()
    assert run.report.selected_entries == plain.report.selected_entries


def test_custom_loss_of_labels_that_no_score_reads() -> None:
    """Fails if soft labels, which the error message sends to loss_fn, cannot be unlearned with it
    because the scores that come first refuse them."""

    def soft(data: TensorDataset) -> TensorDataset:
        x, y = data.tensors
        return TensorDataset(x, F.one_hot(y, 5).to(x.dtype))

    def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    method = deepclean.DeepClean(gamma=GAMMA)
    with pytest.raises(ValueError, match="loss_fn= measures soft or one-hot labels"):
        deepclean.Session(network(), method).measure(soft(FORGET), soft(RETAIN))
    run = deepclean.Session(network(), method, loss_fn=loss_fn).measure(soft(FORGET), soft(RETAIN))
    assert "not computed: labels must be class indices" in run.report.scores["before"]
    run.select()
    plain = session(network()).measure(FORGET, RETAIN)
    plain.select()
    assert run.report.selected_entries == plain.report.selected_entries


@pytest.mark.parametrize("norm", [True, False])
def test_dead_entries_in_batches_of_one(norm: bool) -> None:
    """Fails if batches of one, which BatchNorm cannot normalise, leave every entry unseen and so
    dead."""
    found = []
    for batch_size in (1, 8):
        model = network() if norm else nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
        run = session(model, batch_size=batch_size).measure(FORGET, RETAIN)
        run.select()
        found.append(run.reset().report.dead_fraction)
    assert found[0] < 0.5
    assert found[1] < 0.5


def test_resumed_run_keeps_what_it_reports() -> None:
    """Fails if a resumed run updates statistics that its report says are frozen, or forgets the
    steps from before."""
    model = network()
    run = session(model, norm_statistics="freeze").measure(FORGET, RETAIN)
    run.select()
    run.reset().guard()
    train(model, torch.optim.SGD(model.parameters(), lr=0.01))
    state = copy.deepcopy(run.state_dict())
    run.close()
    again = session(model).load_state_dict(state).guard()
    before = model[1].running_mean.clone()
    train(model, torch.optim.SGD(model.parameters(), lr=0.01))
    report = again.finish()
    assert torch.equal(model[1].running_mean, before)
    assert report.norm_statistics == "freeze"
    assert report.optimizer_steps == 8
    assert report.seconds["fine-tune"] > state["seconds"]["fine-tune"]


def test_stored_diagonal_is_no_training_set() -> None:
    """Fails if `unlearn` asks for a DataLoader around a diagonal."""
    stored = deepclean.fisher_diagonal(network(), RETAIN, progress=False)
    with pytest.raises(TypeError, match=r"stored diagonal has no samples; .* measured="):
        deepclean.unlearn(network(), FORGET, stored, method=deepclean.DeepClean(gamma=GAMMA))


@pytest.mark.filterwarnings("ignore:no optimizer step of this model was seen:UserWarning")
def test_averaged_copy_from_before_keeps_what_was_learned() -> None:
    """Fails if what the README says of averaged (EMA) copies no longer holds: a copy made before
    the reset keeps W_f, whatever is averaged into it later; one made after the reset does not."""
    model = network()
    before = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    before.update_parameters(model)  # the first update is a copy
    run = session(model).measure(FORGET, RETAIN)
    run.select()
    learned = dict(before.module.named_parameters())
    then = {name: p.detach().clone() for name, p in learned.items()}
    run.reset()
    after = torch.optim.swa_utils.AveragedModel(model)
    with pytest.warns(UserWarning, match="AveragedModel averages this model since before"):
        run.guard()
    before.update_parameters(model)
    run.finish()
    for name, mask in run.selection.masks.items():
        assert torch.allclose(learned[name][mask], 0.99 * then[name][mask])
        assert not dict(after.module.named_parameters())[name][mask].any()
    assert any(bool(then[name][mask].any()) for name, mask in run.selection.masks.items())
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    assert "averaged (EMA) copies" in readme


def test_requires_grad_is_left_alone_under_ddp(tmp_path: Path) -> None:
    """Fails if frozen parameters are switched off after wrapping: DistributedDataParallel would
    wait for their gradients, as it does where a test switches one off."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        run = session(wrapped).measure(FORGET, RETAIN)
        run.select()
        run.reset().guard()
        frozen = [n for n, p in model.named_parameters() if n not in run.selection.masks]
        assert frozen
        train(wrapped, torch.optim.SGD(model.parameters(), lr=0.1))
        assert all(p.requires_grad for p in model.parameters())
        assert run.finish().frozen_entries_moved == 0
        model.get_parameter(frozen[0]).requires_grad_(False)
        with pytest.raises(RuntimeError, match="finished reduction"):
            train(wrapped, torch.optim.SGD(model.parameters(), lr=0.1))
    finally:
        dist.destroy_process_group()
