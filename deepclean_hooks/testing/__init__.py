"""`check_method(MyMethod())`: does a method keep the promises that every method makes?

In the style of scikit-learn's `check_estimator`, for those who add a method of their own. Each
check is a function, listed in `CHECKS`; `docs/methods.md` has an example.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader

from deepclean_hooks.integrations.recipe import unlearn
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.methods.method import Method
from deepclean_hooks.session import Session
from deepclean_hooks.stored.bits import differing
from deepclean_hooks.testing.problem import held_out, network, sets

__all__ = ["CHECKS", "check_method", "held_out", "network", "sets"]


def check_method(method: Method) -> None:
    """Runs every check; raises AssertionError, naming the check and what it found, at the first
    promise that is broken."""
    for check in CHECKS:
        try:
            check(method)
        except AssertionError as reason:
            raise AssertionError(f"{method.name}: {check.__name__}: {reason}") from reason


# ------------------------------------------------------------------------------- what is promised


def check_settings(method: Method) -> None:
    """It has a name, and settings that JSON takes and that tell two methods apart."""
    _require(isinstance(getattr(method, "name", None), str), "name must be a string")
    settings = method.settings()
    try:
        again = json.loads(json.dumps(settings))
    except (TypeError, ValueError):
        again = None
    _require(again == settings, f"settings do not survive JSON: {settings!r}")


def check_measuring_leaves_no_trace(method: Method) -> None:
    """Measuring leaves parameters, gradients, buffers, modes, hooks and random states as they
    were."""
    model = network()
    model.norm.eval()  # a mode of its own
    next(iter(model.parameters())).grad = torch.ones_like(next(iter(model.parameters())))
    before, random = _trace(model), torch.get_rng_state()
    _measured(method, model)
    _require(_trace(model) == before, "measuring changed the model")
    _require(torch.equal(torch.get_rng_state(), random), "measuring drew from the random state")


def check_select_is_pure(method: Method) -> None:
    """Selecting changes neither measurement, and twice gives the same."""
    run = _measured(method, network())
    forget, retain = run.measured.forget, run.measured.retain
    before = [_copy(forget), _copy(retain)]
    one, other = method.select(forget, retain), method.select(forget, retain)
    for held, now in zip(before, (forget, retain), strict=True):
        _require(_same(held, now.sums), "select changed a measurement")
    _require(_same(one.masks, other.masks), "select gives another selection the second time")
    for name, mask in one.masks.items():
        _require(mask.dtype == torch.bool, f"the mask of {name} is {mask.dtype}, not bool")


def check_new_values_are_pure(method: Method) -> None:
    """New values change neither weights nor measurements, and twice are the same."""
    model = network()
    run = _measured(method, model)
    forget, retain = run.measured.forget, run.measured.retain
    selection = method.select(forget, retain)
    before, held = _bits(model), [_copy(forget), _copy(retain), _copied(selection.masks)]
    with torch.no_grad():
        one = _copied(method.values(model, selection, forget, retain))
        other = method.values(model, selection, forget, retain)
    _require(_same(before, _bits(model)), "new_values changed the model")
    now = (forget.sums, retain.sums, selection.masks)
    for was, then in zip(held, now, strict=True):
        _require(_same(was, then), "new_values changed a measurement or the selection")
    _require(_same(one, other), "new_values gives other values the second time")


def check_only_the_selection_changes(method: Method) -> None:
    """After the reset, what is not selected has its bits, buffers too, and the report's count is
    right."""
    model = network()
    before = _bits(model)
    run = _measured(method, model)
    report = run.select()
    masks = run.selection.masks
    _require(_same(before, _bits(model)), "selecting changed the model")
    run.reset()
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in _bits(model).items():
        if method.resets_buffers and name in buffers:
            continue
        stays = ~masks.get(name, torch.zeros(tensor.shape, dtype=torch.bool))
        moved = int(differing(tensor, before[name])[stays].sum())
        _require(not moved, f"{moved} entries of {name} changed that were not selected")
    found = sum(int(mask.sum()) for mask in masks.values())
    _require(report.selected_entries == found, f"{report.selected_entries} counted, {found} found")


def check_frozen_entries_are_held(method: Method) -> None:
    """While AdamW with weight decay trains, only free entries move: those that `free` names."""
    model = network()
    run = _measured(method, model)
    run.select()
    run.reset()
    free = method.free(run.selection)
    before = _bits(model)
    run.guard()
    try:
        _train(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), 3)
        moved = _moved(model, before)
        report = run.finish()
    finally:
        run.close()
    _require(report.frozen_entries_moved == 0, f"{report.frozen_entries_moved} frozen ones moved")
    trained = 0
    for name, where in moved.items():
        allowed = free.get(name, torch.zeros_like(where))
        _require(not (where & ~allowed).any(), f"entries of {name} moved that are not free")
        trained += int(where.sum())
    wanted = sum(int(mask.sum()) for mask in free.values())
    _require(trained > 0 or not wanted, "no free entry can train")


def check_batches_do_not_matter(method: Method) -> None:
    """The batch size, the order and drop_last of the loaders have no effect on the selection."""
    forget, retain = sets(torch.float64)
    one = DataLoader(forget, batch_size=10), DataLoader(retain, batch_size=4)
    first = _measured(method, network(torch.float64), *one)
    first.select()
    shuffled = DataLoader(retain, batch_size=7, shuffle=True, drop_last=True)
    other = _measured(method, network(torch.float64), DataLoader(forget, batch_size=3), shuffled)
    other.select()
    _require(
        _same(first.selection.masks, other.selection.masks), "the selection changed with batches"
    )
    _require(first.report.retain_samples == len(retain), "a sample was left out or counted twice")


def check_an_exception_leaves_no_hook(method: Method) -> None:
    """An exception while training leaves no hook on the model or on optimizers."""
    model = network()
    hooks = _hooks(model)
    run = _measured(method, model)
    run.select()
    run.reset().guard()
    try:
        _train(model, torch.optim.SGD(model.parameters(), lr=0.01), 1)
        raise InterruptedError
    except InterruptedError:
        run.close()
    _require(_hooks(model) == hooks, "a hook was left behind")


def check_report_is_json(method: Method) -> None:
    """The report of a whole run survives JSON and names the method."""
    model = network()
    told = json.loads(_whole(method, model).to_json())
    _require(told["method"] == method.name, f"the report names {told['method']!r}")
    _require(told["phase"] == "finished", f"the run ended in phase {told['phase']!r}")
    _require(told["frozen_entries_moved"] == 0, "frozen entries moved")


def check_two_runs_are_the_same(method: Method) -> None:
    """Two whole runs end in the same bits, whatever the global random state is."""
    one, other = network(), network()
    _whole(method, one)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        _whole(method, other)
    _require(_same(_bits(one), _bits(other)), "the second run ended elsewhere")


def check_a_run_resumes(method: Method) -> None:
    """A run that is stored after a step and taken up again ends where an unbroken one does."""
    if method.own_training:
        return  # unlearn() drives these from end to end
    whole, first, second = network(), network(), network()
    with _guarded(method, whole):
        _train(whole, _sgd(whole), 3)
    with _guarded(method, first) as run:
        optimizer = _sgd(first)
        _train(first, optimizer, 1)
        stored = copy.deepcopy((first.state_dict(), optimizer.state_dict(), run.state_dict()))
    second.load_state_dict(stored[0])
    run = Session(second, method, scores=False, progress=False).load_state_dict(stored[2])
    run.watch(forget=DataLoader(sets()[0], batch_size=8)).guard()
    optimizer = _sgd(second)
    optimizer.load_state_dict(stored[1])
    try:
        _train(second, optimizer, 2, start=1)
        run.finish()
    finally:
        run.close()
    _require(_same(_bits(whole), _bits(second)), "the resumed run ended elsewhere")


def check_a_closure_is_a_loop(method: Method) -> None:
    """A loop whose gradients are computed inside the step ends where a plain one does."""
    if method.own_training:
        return  # unlearn() drives these from end to end
    ends = []
    for train in (_train, _train_by_closures):
        model = network()
        with _guarded(method, model):
            train(model, _sgd(model), 3)
        ends.append(_bits(model))
    _require(_same(*ends), "the loop with a closure ended elsewhere")


def check_the_random_state_is_the_loops(method: Method) -> None:
    """While the loop trains, nothing draws from the random state but the loop itself."""
    if method.own_training:
        return
    model = network()
    with _guarded(method, model):
        random = torch.get_rng_state()
        _train(model, _sgd(model), 2)
        _require(torch.equal(torch.get_rng_state(), random), "a step drew from the random state")


CHECKS: tuple[Callable[[Method], None], ...] = (
    check_settings,
    check_measuring_leaves_no_trace,
    check_select_is_pure,
    check_new_values_are_pure,
    check_only_the_selection_changes,
    check_frozen_entries_are_held,
    check_batches_do_not_matter,
    check_an_exception_leaves_no_hook,
    check_report_is_json,
    check_two_runs_are_the_same,
    check_a_run_resumes,
    check_a_closure_is_a_loop,
    check_the_random_state_is_the_loops,
)


# -------------------------------------------------------------------------------------- the means


def _require(kept: bool, broken: str) -> None:
    if not kept:
        raise AssertionError(broken)


def _measured(method: Method, model: nn.Module, forget: Any = None, retain: Any = None) -> Session:
    if forget is None:
        forget, retain = (DataLoader(data, batch_size=8) for data in sets())
    return Session(model, method, scores=False, progress=False).measure(forget, retain)


@contextmanager
def _guarded(method: Method, model: nn.Module) -> Iterator[Session]:
    run = _measured(method, model)
    run.select()
    run.reset().guard()
    try:
        yield run
        run.finish()
    finally:
        run.close()


def _whole(method: Method, model: nn.Module) -> Any:
    forget, retain = sets()
    options: dict[str, Any] = {"scores": False, "progress": False, "batch_size": 8, "epochs": 1}
    return unlearn(model, forget, retain, method=method, **options)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    model.train()
    x, y = sets()[1].tensors
    for step in range(start, start + steps):
        part = slice(8 * step, 8 * step + 8)
        loss: Any = F.cross_entropy(model(x[part]), y[part])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _train_by_closures(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    x, y = sets()[1].tensors

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Any = F.cross_entropy(model(x[part]), y[part])
        loss.backward()
        return loss  # type: ignore[no-any-return]  # a tensor

    for step in range(steps):
        part = slice(8 * step, 8 * step + 8)
        optimizer.step(closure)  # type: ignore[arg-type]  # torch asks for a float, and takes this


def _bits(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _moved(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: differing(p, before[name]) for name, p in model.named_parameters()}


def _copy(measurement: Measurement) -> dict[str, Tensor]:
    return _copied(measurement.sums)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    # NaN stands where 0 was divided by 0, in entries that are not read.
    return one.keys() == other.keys() and all(
        t.shape == other[n].shape and t.dtype == other[n].dtype and t.equal(other[n])
        if not t.is_floating_point()
        else torch.allclose(t, other[n], rtol=0, atol=0, equal_nan=True)
        for n, t in one.items()
    )


def _trace(model: nn.Module) -> list[object]:
    """Everything about a model that measuring could leave changed."""
    tensors = [(n, t.cpu().numpy().tobytes()) for n, t in _bits(model).items()]
    gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return [tensors, gradients, flags, modes, _hooks(model)]


def _hooks(model: nn.Module) -> int:
    """How many hooks hang on the model, its parameters and torch's optimizers."""
    count = len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)
    for module in model.modules():
        count += len(module._forward_hooks) + len(module._forward_pre_hooks)
        count += len(module._backward_hooks)
    for p in model.parameters():
        count += len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ())
    return count
