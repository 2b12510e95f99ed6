"""A run goes on only from what it left: weights that changed, came back or were never loaded are
noticed, and a reset is whole or not at all."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils import weight_norm as weight_norm_by_hooks
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

import deepclean_hooks as deepclean
from deepclean_hooks import DeepClean, GuardError, Session
from deepclean_hooks.measure.usable import Unusable
from deepclean_hooks.methods.ssd import SSD
from deepclean_hooks.run.restored import Restored
from deepclean_hooks.stored import checkpoint
from deepclean_hooks.stored.bits import differing
from deepclean_hooks.stored.checkpoint import model_digest
from lab.sessions import FORGET, RETAIN, network


def session(model: nn.Module, method: deepclean.Method | None = None, **options: Any) -> Session:
    """Measured, without scores."""
    run = Session(model, method or DeepClean(gamma=1.1), scores=False, progress=False, **options)
    return run.measure(FORGET, RETAIN)


def loop(model: nn.Module, steps: int = 2) -> None:
    """A few steps on the retain set."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    batches = iter(DataLoader(RETAIN, batch_size=8))
    for _ in range(steps):
        x, y = next(batches)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def held(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return copy.deepcopy(model.state_dict())


# ---------------------------------------------------------------- stale measurements


def by_data(model: nn.Module) -> None:
    model.get_parameter(next(n for n, _ in model.named_parameters())).data.view(-1)[3] += 1e-3


def by_loading(model: nn.Module) -> None:
    other = held(model)
    other[next(iter(other))].mul_(2)
    model.load_state_dict(other)


def by_train_mode(model: nn.Module) -> None:
    model.train()(RETAIN.tensors[0][:8])


def by_another_session(model: nn.Module) -> None:
    session(model).select()
    run = session(model)
    run.select()
    run.reset()


@pytest.mark.parametrize("change", [by_data, by_loading, by_train_mode, by_another_session])
@pytest.mark.parametrize("selected", [False, True])
def test_a_stale_measurement_is_not_used(
    change: Callable[[nn.Module], None], selected: bool
) -> None:
    """Fails if weights or statistics that changed after the measurement are reset by it."""
    model = network()
    run = session(model)
    if selected:
        run.select()
    change(model)
    if not selected:
        run.select()
    before = model_digest(model)
    with pytest.raises(RuntimeError, match="tensors of the model changed since it was measured"):
        run.reset()
    assert model_digest(model) == before
    assert run.report.phase == "selected"


# ---------------------------------------------------------------- whole or not at all


class Failing(Dataset):
    """The retain set, which fails when it is told to."""

    reason: BaseException | None = None

    def __len__(self) -> int:
        return len(RETAIN)

    def __getitem__(self, index: int) -> Any:
        if self.reason is not None:
            raise self.reason
        return RETAIN[index]


@pytest.mark.parametrize("reason", [OSError("disk"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("method", [SSD(alpha=1.2, fine_tune=True), DeepClean(gamma=1.1)])
def test_a_reset_that_fails_is_undone_and_done_once(
    reason: BaseException, method: deepclean.Method
) -> None:
    """Fails if an error after the writing leaves the new values there, so that a second reset
    dampens twice."""
    model, once, data = network(), network(), Failing()
    run = Session(model, method, scores=False, progress=False).measure(FORGET, data)
    run.select()
    before, data.reason = model_digest(model), reason
    with pytest.raises(type(reason)):
        run.reset()
    assert model_digest(model) == before
    assert run.report.phase == "selected"
    data.reason = None
    run.reset()
    reference = session(once, method)
    reference.select()
    reference.reset()
    assert model_digest(model) == model_digest(once)
    assert run.report.layers == reference.report.layers


def test_a_method_that_fails_while_it_makes_buffers_is_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if running statistics that a method resets stay reset after an error."""
    model = network()
    run = session(model, deepclean.Retrain())
    run.select()
    before = model_digest(model)
    with monkeypatch.context() as patched:
        patched.setattr("deepclean_hooks.session.require_usable", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.reset()
    assert model_digest(model) == before
    run.reset()
    assert model_digest(model) != before


class Cosine(nn.Module):
    """A layer that divides by the length of its rows, without an epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 36))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight / self.weight.norm(dim=1, keepdim=True)
        return 5 * x.flatten(1) @ rows.T


class Standardised(nn.Module):
    """Divides by a root that is 0: the loss is finite, its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 36))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T * (1 + self.weight.square().sum().sqrt())


def normed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(36, 5)))


class All(DeepClean):
    """Everything that may be selected."""

    def select(self, forget: Any, retain: Any) -> Any:
        masks = {n: torch.ones_like(t, dtype=torch.bool) for n, t in forget.sums.items()}
        return deepclean.methods.Selection(masks, 1000, "all")


@pytest.mark.parametrize("make", [normed, Cosine, Standardised])
def test_new_values_that_compute_nan_are_taken_back(make: Callable[[], nn.Module]) -> None:
    """Fails if a model whose loss or gradients are NaN with a layer at 0 is left like that."""
    torch.manual_seed(0)
    model = make()
    run = session(model, All())
    run.select()
    before = model_digest(model)
    with pytest.raises(Unusable, match="the model has its old ones back"):
        run.reset()
    assert model_digest(model) == before


def test_lengths_of_normed_rows_are_norm_scales() -> None:
    """Fails if g of w = g v / |v| may be selected by default, or what is like it by name or shape
    alone may not."""

    def may(model: nn.Module, **settings: Any) -> set[str]:
        method = DeepClean(**settings)
        return {n for n, p in model.named_parameters() if method.may_select(n, p)}

    with pytest.warns(FutureWarning):
        old = nn.Sequential(weight_norm_by_hooks(nn.Linear(36, 5)))
    new = normed()
    assert may(new) == {"1.parametrizations.weight.original1"}
    assert "1.parametrizations.weight.original0" in may(new, one_dimensional=True)
    assert may(old) == {"0.weight_v"}
    recurrent = weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    assert "parametrizations.weight_hh_l0.original0" not in may(recurrent)
    assert may(nn.Linear(36, 1)) == {"weight"}

    class Pair(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return one @ other

        def right_inverse(self, whole: Tensor) -> tuple[Tensor, Tensor]:
            return whole, torch.eye(whole.shape[1])

    low_rank = nn.Linear(4, 5)
    parametrize.register_parametrization(low_rank, "weight", Pair())
    assert "parametrizations.weight.original0" in may(low_rank)


@pytest.mark.parametrize("where", ["parameter", "module"])
def test_entries_that_no_integer_holds_are_refused_first(where: str) -> None:
    """Fails if complex128 is found out after the reset."""
    model = network()
    wide = nn.Parameter(torch.zeros(3, dtype=torch.complex128), requires_grad=False)
    if where == "parameter":
        model.register_parameter("wide", wide)
    else:
        model.add_module("extra", nn.ParameterList([wide]))
    with pytest.raises(ValueError, match="complex128 has 16 bytes an entry"):
        Session(model, DeepClean())


# ---------------------------------------------------------------- what comes back


def stored(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A run that was stored after a step, and the weights of that moment."""
    run = session(model)
    run.select()
    run.reset().guard()
    loop(model, 1)
    state = run.state_dict(), held(model)
    run.close()
    return state


def frozen_half(saved: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The original's weights but for one tensor, as a partial load leaves them."""
    name = next(iter(saved))
    return {**held(model), name: saved[name]}


@pytest.mark.parametrize("loaded", [lambda saved, model: held(model), frozen_half])
def test_a_resume_on_weights_that_were_not_loaded_is_refused(loaded: Any) -> None:
    """Fails if only the frozen entries are compared, which are the original's by design."""
    state, saved = stored(network())
    model = network()
    model.load_state_dict(loaded(saved, network()))
    with pytest.raises(ValueError, match="not those that were stored with this run"):
        Session(model, DeepClean(gamma=1.1)).load_state_dict(state)
    model.load_state_dict(saved)
    assert Session(model, DeepClean(gamma=1.1)).load_state_dict(state).report.phase == "reset"


def test_a_state_of_an_earlier_version_is_refused_with_the_reason() -> None:
    """Fails if a state without a digest of the model is taken, or ends in a KeyError."""
    state, _ = stored(network())
    for earlier in ({k: v for k, v in state.items() if k != "format"}, {**state, "format": "x 1"}):
        with pytest.raises(ValueError, match="earlier ones have no digest of the whole model"):
            Session(network(), DeepClean(gamma=1.1)).load_state_dict(earlier)


def test_the_state_loads_without_pickled_objects(tmp_path: Any) -> None:
    """Fails if the state holds anything but tensors, numbers and strings."""
    state, _ = stored(network())
    torch.save(state, tmp_path / "run.pt")
    read = torch.load(tmp_path / "run.pt", weights_only=True)
    assert read.keys() == state.keys()
    assert read["report"] == state["report"]


def restore_state(model: nn.Module, original: dict[str, Tensor]) -> None:
    model.load_state_dict(original)


def restore_by_data(model: nn.Module, original: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data = original[name].clone()


@pytest.mark.parametrize("restore", [restore_state, restore_by_data])
@pytest.mark.parametrize("resumed", [False, True])
def test_weights_from_before_the_reset_are_noticed(restore: Any, resumed: bool) -> None:
    """Fails if "restore the best weights" un-forgets, in a whole run or in a resumed one."""
    model = network()
    original = held(model)
    run = session(model)
    run.select()
    run.reset()
    if resumed:
        state = run.state_dict()
        run = Session(model, DeepClean(gamma=1.1), scores=False).load_state_dict(state)
    run.guard()
    loop(model)
    restore(model, original)
    with pytest.raises(GuardError, match=r"again, in .* nothing was forgotten"):
        run.finish()
    assert run.report.restored_entries > 0.9 * run.report.selected_entries
    assert run.report.phase == "guarded"
    with pytest.raises(RuntimeError, match="this one is 'failed'"):
        run.state_dict()


def test_a_part_that_comes_back_is_told_and_none_is_none() -> None:
    """Fails if a restored tensor among others passes in silence, or training looks like it."""
    model = network()
    original = held(model)
    run = session(model)
    run.select()
    run.reset().guard()
    loop(model)
    smallest = min((x for x in run.report.layers if x.selected), key=lambda x: x.selected)
    model.get_parameter(smallest.name).data.copy_(original[smallest.name])
    with pytest.warns(UserWarning, match=f"hold their old values again, in {smallest.name}"):
        report = run.finish()
    assert 0 < report.restored_entries <= smallest.selected
    assert any("hold their old values again" in text for text in report.warnings)

    clean = session(network())
    clean.select()
    clean.reset().guard()
    loop(clean.model)
    assert clean.finish().restored_entries == 0


def test_shares_of_what_is_back() -> None:
    """Fails if the chance of a few equal bits in half precision is a warning, or most is none."""
    few, some, most = (Restored({"a": 100}, {"a": n}) for n in (5, 6, 91))
    assert not few.warning
    assert "6 of the 100" in some.warning
    some.require_few()
    with pytest.raises(GuardError, match="91 of the 100"):
        most.require_few()
    assert Restored({}, {}).share == 0


# ---------------------------------------------------------------- caches


class Cached(nn.Module):
    """Keeps a derived tensor from one eval forward to the next, as timm's LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.head = nn.Parameter(torch.randn(2, 36)), nn.Linear(36, 5)
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            kept = self.bias.sin().sum(0)
        else:
            kept = self.kept = self.bias.sin().sum(0) if self.kept is None else self.kept
        return self.head((x.flatten(1) + kept).tanh())


@pytest.mark.parametrize(
    "method",
    [
        DeepClean(gamma=1.0),
        SSD(alpha=1.2, estimator=deepclean.BatchMean(batch_size=8), fine_tune=True),
        deepclean.SalUn(),
    ],
)
def test_models_that_keep_a_derived_tensor(method: deepclean.Method) -> None:
    """Fails if a second batch meets what the first one left: its graph, or its old weights."""
    torch.manual_seed(0)
    model = Cached().eval()
    run = Session(
        model, method, batch_size=4, scores=True, progress=False, norm_statistics="freeze"
    )
    run.measure(FORGET, RETAIN).select()
    run.reset().guard()
    model.eval()
    x = RETAIN.tensors[0][:4]
    fresh = copy.deepcopy(model)
    fresh.kept = None
    assert torch.equal(model(x), fresh(x))
    run.close()


# ---------------------------------------------------------------- what the report tells


class Augmented(Dataset):
    """Other samples each time."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + torch.randn_like(x), y


@pytest.mark.parametrize("method", [DeepClean(gamma=1.1), deepclean.FineTune(), deepclean.LFSSD()])
def test_a_random_transform_stands_in_the_report(method: deepclean.Method) -> None:
    """Fails if it is said on the terminal alone, or by one estimator alone."""
    run = Session(network(), method, scores=False, progress=False)
    with pytest.warns(UserWarning, match="change from pass to pass"):
        run.measure(Augmented(FORGET), RETAIN)
    told = [text for text in run.report.warnings if "change from pass to pass" in text]
    both = " and retain" if method.joint else ""  # D_f is walked with D_r as well
    assert [f"the samples of forget{both} change" in text for text in told] == [True]
    assert not session(network(), method).report.warnings


def known(model: nn.Module) -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A model that is right on both sets."""
    data = [FORGET.tensors[0], RETAIN.tensors[0]]
    with torch.no_grad():
        labels = [model.eval()(x).argmax(1) for x in data]
    return model, *(TensorDataset(x, y) for x, y in zip(data, labels, strict=True))


@pytest.mark.parametrize("shift", [1, 2])
def test_labels_of_the_forget_set_mapped_otherwise(shift: int) -> None:
    """Fails if a model that is right on D_r and never on D_f goes on without a word."""
    model, forget, retain = known(network())
    wrong = TensorDataset(forget.tensors[0], (forget.tensors[1] + shift) % 5)
    run = Session(model, DeepClean(gamma=1.1), progress=False)
    with pytest.warns(UserWarning, match="labels of the forget set may be mapped otherwise"):
        run.measure(wrong, retain)
    assert any("mapped otherwise" in text for text in run.report.warnings)
    right = Session(network(), DeepClean(gamma=1.1), progress=False).measure(forget, retain)
    assert not right.report.warnings


# ---------------------------------------------------------------- scores


def wide_gold() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 7))


def other_input() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(35, 5))


def test_gold_that_cannot_be_compared_is_refused_first() -> None:
    """Fails if a gold model of other classes or inputs is found out when the run has ended."""
    model = network()
    before = model_digest(model)
    cases = [(wide_gold(), "a gold model has 7 classes"), (other_input(), "shapes")]
    golds: list[Any] = [
        *cases,
        ([network(), wide_gold()], "a gold model has 7 classes"),
        (deepclean.evaluate(network(), forget=FORGET), "no figures for retain"),
    ]
    for gold, words in golds:
        run = Session(model, DeepClean(gamma=1.1), gold=gold, progress=False)
        with pytest.raises((ValueError, RuntimeError), match=words):
            run.measure(FORGET, RETAIN)
    assert model_digest(model) == before


class Test(Failing):
    """A test set that fails at the end."""


@pytest.mark.parametrize("reason", [OSError("gone"), RuntimeError("out of memory")])
def test_a_score_that_fails_at_the_end_leaves_the_report(reason: Exception) -> None:
    """Fails if the report of a finished run is lost with its last evaluation."""
    model, test = network(), Test()
    run = Session(model, DeepClean(gamma=1.1), test=test, progress=False).measure(FORGET, RETAIN)
    run.select()
    run.reset().guard()
    loop(model)
    test.reason = reason
    report = run.finish()
    assert report.phase == "finished"
    assert report.frozen_entries_moved == 0
    assert report.model_after == model_digest(model)
    assert report.scores["after"] == f"not computed: {reason}"
    assert isinstance(report.scores["before"], dict)
    assert f"not computed: {reason}" in str(report)


def test_what_a_loss_is() -> None:
    """Fails if two losses of one name are one to the ranks, or one loss is two."""
    from deepclean_hooks.run.entry import identity

    def made(weight: float) -> Any:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return weight * F.cross_entropy(model(batch[0]), batch[1], reduction="none")

        return loss

    def other() -> Any:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return F.nll_loss(model(batch[0]), batch[1], reduction="none")

        return loss

    losses = [made(1.0), made(2.0), functools.partial(made(1.0), extra=1), lambda m, b: m(b)]
    assert len({identity(loss).replace("other.", "made.") for loss in [*losses, other()]}) == 5
    assert identity(made(1.0)) == identity(made(1.0))
    assert identity(deepclean.data.losses.cross_entropy) == identity(
        deepclean.data.losses.cross_entropy
    )


def test_copies_put_nothing_back() -> None:
    """The opposite of the restored weights: without a restoring loop every changed entry stays
    changed, so the count is of the loop's doing."""
    model = network()
    original = held(model)
    run = session(model)
    run.select()
    run.reset()
    masks = run.selection.masks
    now = dict(model.named_parameters())
    changed = sum(int(differing(now[n], original[n]).sum()) for n in masks)
    assert changed == sum(run._at.changed.values())


@pytest.mark.parametrize("stored", [False, True])
def test_the_model_is_hashed_once_for_each_state(
    stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if report, checkpoint, both diagonals and the frozen entries each read the whole model
    again: once when it is measured, once before it is written, once at the end."""
    model = network()
    data = deepclean.fisher_diagonal(model, RETAIN) if stored else RETAIN
    passes: list[int] = []
    digests_of = checkpoint.digests_of
    monkeypatch.setattr(checkpoint, "digests_of", lambda m: (passes.append(1), digests_of(m))[1])
    run = Session(model, DeepClean(gamma=1.1), scores=False, progress=False)
    run.measure(FORGET, data).select()
    assert len(passes) == 1
    run.reset().guard()
    assert len(passes) == 2
    loop(model)
    run.finish()
    assert len(passes) == 3


def pruned(model: nn.Module) -> None:
    """As torch.nn.utils.prune leaves a layer: its weight has another name."""
    prune.l1_unstructured(model[4], "weight", 0.3)


def parametrized(model: nn.Module) -> None:
    """As torch.nn.utils.parametrizations leave a layer."""
    weight_norm(model[4])


@pytest.mark.parametrize("change", [pruned, parametrized])
def test_a_parameter_that_is_gone_is_named(change: Callable[[nn.Module], None]) -> None:
    """Fails if `finish` ends in a KeyError where the loop took a parameter away, or if the phase
    that follows does not say that the error stands."""
    model = network()
    run = session(model)
    run.select()
    run.reset().guard()
    change(model)
    with pytest.raises(GuardError, match=r"4\.weight.* replaced by other objects"):
        run.finish()
    with pytest.raises(RuntimeError, match="has raised, which stands: load the original weights"):
        run.finish()


@pytest.mark.parametrize("repeat", [lambda: Subset(FORGET, [0, 0, 1, 2, 3]), None])
def test_repeated_samples_are_told(repeat: Callable[[], Dataset[Any]] | None) -> None:
    """Fails if a sample that weighs twice in the measurement is not spoken of."""
    forget: Any = repeat and repeat()
    if forget is None:
        forget = DataLoader(FORGET, 4, collate_fn=lambda part: default_collate([*part, *part]))
    run = Session(network(), DeepClean(gamma=1.1), scores=False, progress=False)
    report = run.measure(forget, RETAIN).report
    assert any("forget holds" in said and "are distinct" in said for said in report.warnings)
    assert not any("are distinct" in said for said in session(network()).report.warnings)
