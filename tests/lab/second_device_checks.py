"""What a GPU would show: the model on another kind of device than the data, stored files and gold
models. Run by tests/persample/test_device.py in a process of its own."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks import testing
from deepclean_hooks.methods import teachers
from deepclean_hooks.metrics import pools, relearn
from deepclean_hooks.testing.problem import Net
from lab import second_device
from lab.cases import CASES
from lab.methods import METHODS
from lab.reference import relative_error, squared_gradients

second_device.start()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

OPTIONS: dict[str, Any] = {"progress": False, "batch_size": 8}
METHOD = deepclean.DeepClean(gamma=1.1)
FORGET, RETAIN = testing.sets()


def network() -> nn.Module:
    return testing.network().to(second_device.NAME)


def unseen_images() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(24, 1, 6, 6, generator=generator), torch.arange(24) % 4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """An epoch on the retain set; returns the optimizer."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x, y in DataLoader(RETAIN, batch_size=8):
        loss = F.cross_entropy(model(x.to(second_device.NAME)), y.to(second_device.NAME))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_devices_do_not_mix() -> None:
    """Without this nothing here could fail."""
    here, there = torch.ones(2), torch.ones(2, device=second_device.NAME)
    for mixed in (lambda: there + here, lambda: torch.where(there > 0, there, here)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (there + there).cpu().tolist() == [2, 2]


# The device has no fused LSTM cell.
@pytest.mark.parametrize("name", [name for name in CASES if name != "lstm"])
def test_fisher(name: str) -> None:
    """Fails if a rule makes a tensor on the wrong device, or an accelerator's way is not exact."""
    model, (x, y) = CASES[name].model().double(), CASES[name].batch(5)
    x = x.double() if x.is_floating_point() else x
    truth = squared_gradients(model, x, y)
    data = TensorDataset(x, y)
    plain = deepclean.fisher_diagonal(model, data, batch_size=3, progress=False)
    model = model.to(second_device.NAME)
    found = deepclean.fisher_diagonal(model, data, batch_size=3, progress=False)
    assert {total.device.type for total in found.sums.values()} == {second_device.NAME}
    assert relative_error({n: total.cpu() for n, total in found.sums.items()}, truth) <= 1e-9
    assert found.settings["one_sample_loop"] == plain.settings["one_sample_loop"]


@pytest.mark.parametrize("name", METHODS)
def test_method_keeps_its_promises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a method mixes devices."""
    build, sets = testing.network, testing.sets

    def moved(dtype: torch.dtype = torch.float32) -> list[TensorDataset]:
        return [
            TensorDataset(*(t.to(second_device.NAME) for t in data.tensors)) for data in sets(dtype)
        ]

    monkeypatch.setattr(testing, "network", lambda *dtype: build(*dtype).to(second_device.NAME))
    monkeypatch.setattr(testing, "sets", moved)
    testing.check_method(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_whole_run_with_scores(name: str) -> None:
    """Fails if scoring mixes a model on the device with data or a gold model that are not."""
    report = deepclean.unlearn(
        network(),
        FORGET,
        RETAIN,
        method=METHODS[name],
        epochs=1,
        test=unseen_images(),
        forget_test=FORGET,
        gold=[testing.network(), network()],
        **OPTIONS,
    )
    assert report.phase == "finished"


def test_stored_diagonal(tmp_path: Path) -> None:
    """Fails if a diagonal read from a file, which is on the CPU, does not serve a model that is
    not, or selects other entries than one that was measured anew."""
    stored = deepclean.fisher_diagonal(network(), ConcatDataset([FORGET, RETAIN]), **OPTIONS)
    stored.save(tmp_path / "all.safetensors")
    read = deepclean.FisherDiagonal.load(tmp_path / "all.safetensors")
    assert next(iter(read.sums.values())).device.type == "cpu"
    chosen = []
    for retain in (RETAIN, read):
        model = network()
        with deepclean.unlearning(
            model, forget=FORGET, retain=retain, method=METHOD, scores=False, **OPTIONS
        ) as run:
            train(model)
        chosen.append({name: mask.cpu() for name, mask in run.selection.masks.items()})
        assert run.report.frozen_entries_moved == 0
    assert all(torch.equal(chosen[0][name], chosen[1][name]) for name in chosen[0])
    forget = deepclean.fisher_diagonal(network(), FORGET, **OPTIONS)
    assert ((read - forget) + forget).count == read.count


@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.ASGD],
)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_entries_are_held(make: Any, foreach: bool, dtype: torch.dtype) -> None:
    """Fails if the kernels that serve all tensors at once, which no CPU takes, write other bits."""
    torch.manual_seed(0)
    model = testing.network(dtype).to(second_device.NAME)
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    free = {n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters() if p.dim() > 1}
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1, foreach=foreach)
    with deepclean.Guard(model, free) as guard:
        for x, y in DataLoader(testing.sets(dtype)[1], batch_size=8):
            loss = F.cross_entropy(model(x.to(second_device.NAME)), y.to(second_device.NAME))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        guard.check()
    for name, p in model.named_parameters():
        mask = free.get(name, torch.zeros_like(before[name], dtype=torch.bool))
        now = p.detach().cpu()
        assert torch.equal(now[~mask], before[name][~mask]), name
        assert not mask.any() or not torch.equal(now[mask], before[name][mask]), name


def test_compact() -> None:
    """Fails if values of compact tensors go to another device's entries."""
    model = network()
    with deepclean.unlearning(
        model, forget=FORGET, retain=RETAIN, method=METHOD, scores=False, **OPTIONS
    ) as run:
        leaves = run.compact()
        train(model, torch.optim.AdamW(leaves.values(), lr=1e-3))
    assert {leaf.device.type for leaf in leaves.values()} == {second_device.NAME}
    assert run.report.frozen_entries_moved == 0


def test_resumed_from_a_file_on_the_cpu() -> None:
    """Fails if a stored run, read to the CPU, is not taken up by a model on the device."""
    model, file = network(), io.BytesIO()
    sets: dict[str, Any] = {"forget": FORGET, "retain": RETAIN, "method": METHOD}
    with deepclean.unlearning(model, **sets, **OPTIONS) as run:
        train(model)
        # torch writes the storages of devices that it knows.
        weights = {name: t.cpu() for name, t in model.state_dict().items()}
        torch.save({"model": weights, "run": run.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True, map_location="cpu")
    again = network()
    again.load_state_dict(stored["model"])
    with deepclean.unlearning(again, resume=stored["run"], **sets, **OPTIONS) as run:
        train(again)
    assert run.report.frozen_entries_moved == 0


def test_gamma_auto() -> None:
    """Fails if the trials of gamma mix devices."""
    model = network()
    method = deepclean.DeepClean(gamma="auto")
    with deepclean.unlearning(
        model, forget=FORGET, retain=RETAIN, method=method, scores=False, **OPTIONS
    ) as run:
        train(model)
    assert run.report.gamma_choice is not None
    assert deepclean.gamma_sweep(network(), FORGET, RETAIN, **OPTIONS).points


def test_evaluation() -> None:
    """Fails if a figure needs models on one device."""
    found = deepclean.evaluate(
        network(),
        forget=FORGET,
        retain=RETAIN,
        test=unseen_images(),
        gold=[testing.network(), network()],
        untrained=testing.network(),
        probe=True,
        **OPTIONS,
    )
    assert found.gaps
    assert found.zrf.value is not None
    assert pools.margins([network(), testing.network()], FORGET).shape == (2, 10)
    assert relearn.relearn_steps(network(), FORGET, to_loss=1.0).value is not None


def test_built_network_comes_to_the_device() -> None:
    """Fails if `Retrain(build=...)` leaves what a user's function builds on the CPU."""
    model = network()
    anew = teachers.fresh(model, seed=0, build=Net)
    assert {p.device.type for p in anew.parameters()} == {second_device.NAME}
    method = deepclean.Retrain(build=Net)
    deepclean.unlearn(model, FORGET, RETAIN, method=method, epochs=1, scores=False, **OPTIONS)


def test_custom_loss() -> None:
    """Fails if a loss of the user's own gets batches that are not where the model is."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    assert deepclean.fisher_diagonal(network(), FORGET, loss_fn=loss, **OPTIONS).count == 10
