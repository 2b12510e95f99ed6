"""Requests one after the other: probed once, samples out are out, weights before or after by
choice."""

import copy
import gc
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.data import losses
from deepclean_hooks.persample import planner
from deepclean_hooks.persample.engine import SquaredGradients
from lab import small
from lab.reference import relative_error

METHOD = deepclean.DeepClean(gamma=1.1)


network = partial(small.network, dtype=torch.float64)
samples = partial(small.samples, dtype=torch.float64, of=30)
D, FIRST, SECOND, REST = samples(0, 30), samples(0, 4), samples(4, 9), samples(9, 30)


def session(model: nn.Module, **options: object) -> deepclean.Session:
    """A session without scores."""
    return deepclean.Session(model, METHOD, scores=False, batch_size=8, **options)


def selected(run: deepclean.Session) -> dict[str, Tensor]:
    """W_f of a measured session."""
    run.select()
    return run.selection.masks


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time a model is probed."""
    times: list[int] = []
    original = SquaredGradients._make_plan
    monkeypatch.setattr(
        SquaredGradients, "_make_plan", lambda self, b: (times.append(1), original(self, b))[1]
    )
    return times


def test_a_model_is_probed_once(probed: list[int]) -> None:
    """Fails if the retain pass or a later request probes again, or another model uses its plans."""
    model = network()
    session(model).measure(FIRST, Subset(D, range(4, 30)))
    assert len(probed) == 1
    session(model).measure(SECOND, REST)
    assert len(probed) == 1
    session(copy.deepcopy(model)).measure(SECOND, REST)
    assert len(probed) == 2


def test_direct_calls_probe_once_too(probed: list[int]) -> None:
    """Fails if plans are only a session's: a second call, another set or a session probes again."""
    model = network()
    first = deepclean.fisher_diagonal(model, FIRST)
    again = deepclean.fisher_diagonal(nn.DataParallel(model), FIRST)
    deepclean.fisher_diagonal(model, SECOND, accumulate=torch.float32)
    assert len(probed) == 1
    assert all(torch.equal(total, again.sums[name]) for name, total in first.sums.items())
    session(model).measure(FIRST, REST)  # other parameters are measured
    session(model).measure(SECOND, REST)
    assert len(probed) == 2
    with pytest.raises(TypeError, match="plans"):
        deepclean.fisher_diagonal(model, FIRST, plans={})


def test_a_changed_model_is_probed_again(probed: list[int]) -> None:
    """Fails if plans outlive a layer, a flag or the shapes they were made for."""
    model = network()
    changes = (
        lambda: setattr(model[1], "eps", 1e-3),
        lambda: model.__setitem__(2, nn.Tanh()),
        lambda: model.__setitem__(4, nn.Linear(64, 7).double()),
    )
    session(model).measure(FIRST, REST)
    for count, change in enumerate(changes, 2):
        change()
        session(model).measure(FIRST, REST)
        assert len(probed) == count
    model[0].weight.data += 0.1  # other weights alone change nothing of how it is measured
    run = session(model).measure(FIRST, REST)
    assert len(probed) == 4
    assert relative_error(run.measured.retain.sums, direct(model, REST).sums) <= 1e-12


def direct(model: nn.Module, data: TensorDataset) -> deepclean.FisherDiagonal:
    """The diagonal, of the parameters that the method may select, with no plans from before."""
    return deepclean.fisher_diagonal(copy.deepcopy(model), data, parameters=METHOD.may_select)


def measured_by_a_loss_that_holds_the_model() -> int:
    """Measures a model of its own; returns how many models have plans meanwhile."""
    model = network()

    def loss(inner: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert inner is model
        return losses.cross_entropy(inner, batch)

    session(model, loss_fn=loss).measure(FIRST, REST)
    return len(planner._PLANS)


def test_plans_go_with_the_model() -> None:
    """Fails if a model lives on in its plans, or in the loss that they are of."""
    gc.collect()
    before = len(planner._PLANS)
    assert measured_by_a_loss_that_holds_the_model() == before + 1
    gc.collect()
    assert len(planner._PLANS) == before


def test_another_loss_is_probed_and_a_dropped_one_forgotten(probed: list[int]) -> None:
    """Fails if the plan of one loss serves another, or plans of dropped losses pile up."""
    model = network()
    for count in (1, 2, 3):
        session(model, loss_fn=lambda m, b: losses.cross_entropy(m, b)).measure(FIRST, REST)
        gc.collect()
        assert len(probed) == count
        assert len(planner._PLANS[model][1]) == 1


def test_two_requests_from_one_stored_diagonal(tmp_path: Path) -> None:
    """Fails if D minus two requests is not the rest, or a file forgets what was taken out."""
    model = network()
    stored = deepclean.fisher_diagonal(model, D)
    first, second = (deepclean.fisher_diagonal(model, part) for part in (FIRST, SECOND))
    left = stored - first - second
    expected = deepclean.fisher_diagonal(model, REST)
    assert left.count == 21
    assert torch.equal(left.samples, expected.samples)
    assert relative_error(left.sums, expected.sums) <= 1e-9
    left.save(tmp_path / "left")
    loaded = deepclean.FisherDiagonal.load(tmp_path / "left")
    assert loaded.already_out(first) == 4
    assert loaded.already_out(second) == 5
    assert loaded.already_out(expected) == 0
    assert (loaded + first).already_out(first) == 0


def test_a_file_of_the_first_version_is_read_with_a_warning(tmp_path: Path) -> None:
    """Fails if a diagonal stored by an earlier version, without digest and without what was taken
    out, cannot be loaded, or passes for one that a digest vouches for."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    stored = deepclean.fisher_diagonal(network(), FIRST)
    stored.save(tmp_path / "new")
    with safe_open(tmp_path / "new", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "new")
    del tensors["taken_out"]
    assert metadata.pop("digest")
    metadata["format"] = "deepclean-hooks fisher diagonal 1"
    save_file(tensors, tmp_path / "old", metadata)
    with pytest.warns(UserWarning, match="old was written by an earlier version without a digest"):
        assert deepclean.FisherDiagonal.load(tmp_path / "old").taken_out.tolist() == []


def test_samples_that_are_out_cannot_be_asked_for_again() -> None:
    """Fails if a request repeats, wholly or in part, without a word."""
    model = network()
    first = deepclean.fisher_diagonal(model, FIRST)
    left = deepclean.fisher_diagonal(model, D) - first
    session(model).measure(SECOND, left)
    with pytest.raises(ValueError, match="4 were taken out of it before"):
        left - first
    with pytest.raises(ValueError, match="4 of the 4 forget samples were taken out of the stored"):
        session(model).measure(FIRST, left)
    with pytest.raises(ValueError, match="2 of the 5 forget samples were taken out of the stored"):
        session(model).measure(samples(2, 7), left)


def test_a_duplicate_of_what_is_out_may_still_be_asked_for() -> None:
    """Fails if one of two equal samples taken out bars the other."""
    model = network()
    twice = torch.utils.data.ConcatDataset([D, FIRST])
    first = deepclean.fisher_diagonal(model, FIRST)
    left = deepclean.fisher_diagonal(model, twice) - first
    assert session(model).measure(FIRST, left).report.retain_samples == 26


def unlearned(model: nn.Module) -> None:
    """Forgets FIRST and trains one step."""
    with deepclean.unlearning(
        model, forget=FIRST, retain=samples(4, 30), method=METHOD, scores=False, batch_size=8
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = REST.tensors
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_weights_before_or_after_is_a_choice() -> None:
    """Fails if a diagonal of earlier weights is taken unasked, or is not the one that was asked
    for."""
    model = network()
    earlier = copy.deepcopy(model)
    left = deepclean.fisher_diagonal(model, samples(4, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # dead entries
        unlearned(model)

    with pytest.raises(ValueError, match=r"choose it as it is with of_earlier_weights\(\)"):
        session(model).measure(SECOND, left)
    with pytest.raises(ValueError, match=r"of_earlier_weights\(without="):
        session(model).measure(SECOND, left.of_earlier_weights())

    before = left.of_earlier_weights(without=deepclean.fisher_diagonal(earlier, SECOND))
    run = session(model).measure(SECOND, before)
    masks = selected(run)
    d_f = direct(model, SECOND).mean()
    d_r = direct(earlier, REST).mean()
    assert all(torch.equal(masks[n], d_f[n] > 1.1 * d_r[n]) for n in masks)
    told = run.report.measurement["retain"]
    assert told["of_earlier_weights"] is True
    assert told["model"] != run.report.model_before

    after = session(model).measure(SECOND, deepclean.fisher_diagonal(model, REST))
    assert "of_earlier_weights" not in after.report.measurement["retain"]
    others = selected(after)
    assert any(not torch.equal(masks[n], others[n]) for n in masks)


def test_earlier_weights_keep_what_is_out() -> None:
    """Fails if the choice of earlier weights loses what an earlier request took out."""
    model = network()
    first, second = (deepclean.fisher_diagonal(model, part) for part in (FIRST, SECOND))
    left = deepclean.fisher_diagonal(model, D) - first
    with pytest.raises(ValueError, match="4 of the 4 forget samples were taken out"):
        session(model).measure(FIRST, left.of_earlier_weights(without=second))
    hand = (left - second).of_earlier_weights()
    with pytest.raises(ValueError, match=r"from before that with of_earlier_weights\(without="):
        session(model).measure(SECOND, hand)
