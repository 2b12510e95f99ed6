"""The guard in every situation a training loop may bring."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from deepclean_hooks.guard import held
from deepclean_hooks.guard.guard import Guard
from deepclean_hooks.stored.bits import bits, differing
from lab.guarding import changed, data, loss_of, plain, plant, small, snapshot

pytestmark = pytest.mark.usefixtures("optimizer_hooks_as_before")


def accumulation(model: nn.Module) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for micro in range(6):
        (loss_of(model) / 3).backward()
        if micro % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def autocast(model: nn.Module) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()


def scaler(model: nn.Module) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    scale = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scale.scale(loss_of(model) * factor).backward()
        scale.step(optimizer)
        scale.update()


def in_backward(model: nn.Module) -> None:
    opts = {p: optim.AdamW([p], lr=1e-2) for p in model.parameters()}

    def hook(parameter: nn.Parameter) -> None:
        opts[parameter].step()
        opts[parameter].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(hook) for p in opts]
    for _ in range(3):
        loss_of(model).backward()
    for handle in handles:
        handle.remove()


def new_midway(model: nn.Module) -> None:
    for make in (optim.SGD, optim.Adam):
        optimizer = make(model.parameters(), lr=1e-2, weight_decay=1e-1)
        loss_of(model).backward()
        optimizer.step()


def rebuilt_groups(model: nn.Module) -> None:
    optimizer = optim.AdamW(list(model.parameters())[:1], lr=1e-2)
    for _ in range(3):
        optimizer.param_groups.clear()
        optimizer.add_param_group({"params": list(model.parameters()), "lr": 1e-2})
        loss_of(model).backward()
        optimizer.step()


def nan_loss(model: nn.Module) -> None:
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    (loss_of(model) * float("nan")).backward()
    optimizer.step()
    assert all(p.isnan().any() for p in model.parameters() if p.ndim > 1)


def infinite_gradient(model: nn.Module) -> None:
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    (loss_of(model) * float("inf")).backward()
    optimizer.step()


def twice_and_checkpointed(model: nn.Module) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    images, labels = data()
    for reentrant in (False, True):
        features = model[:3](images)
        hidden = checkpoint(model[3:5], features, use_reentrant=reentrant)
        hidden = hidden + model[3:5](features)
        functional.cross_entropy(model[5](hidden), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def sharpness_aware(model: nn.Module) -> None:
    optimizer = optim.SGD(model.parameters(), lr=1e-1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        loss_of(model).backward()
        moves = [1e-2 * p.grad for p in model.parameters()]
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), moves)
        model.zero_grad()
        loss_of(model).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), moves)
        optimizer.step()


def channels_last(model: nn.Module) -> None:
    plain(model.to(memory_format=torch.channels_last))


def scheduled(model: nn.Module) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        schedule.step()


def compiled(model: nn.Module) -> None:
    plain(torch.compile(model, backend="aot_eager"))


def compiled_step(model: nn.Module) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        loss_of(model).backward()
        step()


def swapped(model: nn.Module) -> None:
    first = model[3].weight
    torch.utils.swap_tensors(first, nn.Parameter(first.detach().clone()))
    plain(model)


def data_replaced(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    plain(model)


SITUATIONS = [
    accumulation,
    autocast,
    plain,
    scaler,
    in_backward,
    new_midway,
    rebuilt_groups,
    nan_loss,
    infinite_gradient,
    twice_and_checkpointed,
    sharpness_aware,
    channels_last,
    scheduled,
    compiled,
    pytest.param(compiled_step, marks=pytest.mark.slow),
    data_replaced,
    swapped,
]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_frozen_bits_hold_in_every_situation(situation: Callable[[nn.Module], None]) -> None:
    """Fails if a way of training gets past the hooks; each moves frozen entries without the
    guard."""
    loose = small()
    free, then = plant(loose), snapshot(loose)
    situation(loose)
    assert changed(loose, then, free, frozen=True)
    model = small()
    plant(model)
    with Guard(model, free) as guard:
        situation(model)
        assert changed(model, then, free, frozen=True) == 0
        guard.check()
        assert guard.steps > 0


@pytest.mark.slow
def test_inductor_holds() -> None:
    """Fails if compiled kernels write frozen entries after the restore."""
    model = small()
    free, then = plant(model), snapshot(model)
    with Guard(model, free):
        plain(torch.compile(model))
    assert changed(model, then, free, frozen=True) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_hold(dtype: torch.dtype) -> None:
    """Fails if bits are read with the wrong width, or -0.0 and subnormals are lost in a half
    type."""
    model = small().to(dtype)
    free, then = plant(model), snapshot(model)
    with Guard(model, free) as guard:
        optimizer = optim.AdamW(model.parameters(), lr=1e-1, weight_decay=1.0)
        for _ in range(3):
            loss_of(model).backward()
            optimizer.step()
        guard.check()
    assert changed(model, then, free, frozen=True) == 0
    assert changed(model, then, free, frozen=False)


def test_infinity_in_frozen_gradients_stays_out_of_the_step() -> None:
    """Fails if gradients are multiplied with the mask: inf * 0 is NaN, and GradScaler skips the
    step."""
    model = nn.Linear(2, 1, bias=False)
    free = {"weight": torch.tensor([[False, True]])}
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, free):
        (model(torch.ones(1, 2)) * 0 + model.weight @ torch.tensor([float("inf"), 1.0])).backward()
        assert model.weight.grad.tolist() == [[0.0, 1.0]]
        before = model.weight[0, 1].item()
        optimizer.step()
    assert model.weight[0, 1].item() == pytest.approx(before - 0.1)


def test_tied_weights_are_held_once() -> None:
    """Fails if a tied parameter is masked under a second name or loses one of its two gradients."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    model = Tied()
    free, then = plant(model), snapshot(model)
    with Guard(model, free):
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    assert changed(model, then, free, frozen=True) == 0
    assert changed(model, then, free, frozen=False)
    with pytest.raises(ValueError, match=r"second\.weight: no such parameter"):
        Guard(model, {"second.weight": torch.ones(4, 4, dtype=torch.bool)})


def test_gradients_from_before_are_masked() -> None:
    """Fails if a gradient left by an earlier backward reaches the optimizer (1.7e-2 was
    measured)."""
    model = small()
    free = plant(model)
    loss_of(model).backward()
    loose = {name: p.grad.clone() for name, p in model.named_parameters()}
    with Guard(model, free):
        for name, parameter in model.named_parameters():
            mask = free.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
            assert not parameter.grad[~mask].any()
            assert torch.equal(parameter.grad[mask], loose[name][mask])


def test_sparse_gradients_are_masked() -> None:
    """Fails if the gradient of nn.Embedding(sparse=True) is taken for a strided one, or is not
    masked."""
    model = nn.Embedding(6, 3, sparse=True)
    free, then = {"weight": torch.rand(6, 3) < 0.5}, snapshot(model)
    free["weight"][2] = torch.tensor([True, False, True])
    with Guard(model, free):
        optimizer = optim.SparseAdam(model.parameters(), lr=0.1)
        model(torch.tensor([2, 2, 5])).sum().backward()
        assert model.weight.grad.to_dense()[2].tolist() == [2.0, 0.0, 2.0]
        optimizer.step()
    assert changed(model, then, free, frozen=True) == 0
    assert changed(model, then, free, frozen=False)


def test_masks_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the chunks of a mask and of the parameter are walked in different orders."""
    monkeypatch.setattr(held, "CHUNK", 7)
    for form in (torch.contiguous_format, torch.channels_last):
        model = small().to(memory_format=form)
        free, then = plant(model), snapshot(model)
        with Guard(model, free):
            plain(model)
        assert changed(model, then, free, frozen=True) == 0
        assert changed(model, then, free, frozen=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_together_restores_the_bits_of_one_by_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the foreach form, which GPUs take, loses a NaN's payload, -0.0 or the lowest
    integer, or a group leaves a parameter out."""
    model = small().to(dtype)
    free = plant(model)
    everything = [
        held.Held(name, p, free[name])
        for name, p in model.named_parameters()
        if name in free and free[name].any()
    ]
    generator, wild = torch.Generator().manual_seed(3), {}
    for one in everything:
        kind = one.frozen.dtype
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
        wild[one.name] = torch.randint(low, high, one.frozen.shape, generator=generator, dtype=kind)
        wild[one.name].view(-1)[5:8] = low
        bits(one.parameter).copy_(wild[one.name])
        one.restore()
    expected = {one.name: bits(one.parameter).clone() for one in everything}
    assert any((expected[name] != wild[name]).any() for name in wild)
    monkeypatch.setattr(held, "GROUP", 100)
    parts = held.groups(everything)
    assert 1 < len(parts) < len(everything)
    for part in parts:
        for one in part:
            bits(one.parameter).copy_(wild[one.name])
        held.restore_together(part)
    for one in everything:
        assert torch.equal(bits(one.parameter), expected[one.name])


def test_hidden_gradients_come_back() -> None:
    """Fails if a step leaves a wholly frozen parameter without gradient or state, as a loop that
    reads every gradient and a strict distributed checkpoint would find."""
    model = small()
    free = plant(model)
    with Guard(model, free):
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            assert all(p.grad is not None for p in model.parameters())
            assert all(p in optimizer.state for p in model.parameters())
    assert optimizer.state[model[5].bias]["step"] == 1
    assert optimizer.state[model[5].weight]["step"] == 3


def test_a_parameter_that_is_a_view_with_gaps_holds() -> None:
    """Fails if a parameter that does not fill its memory is walked as one line."""
    model = nn.Linear(5, 4, bias=False)
    model.weight = nn.Parameter(torch.randn(4, 10)[:, ::2])
    free, then = {"weight": torch.rand(4, 5) < 0.5}, snapshot(model)
    with Guard(model, free):
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
    assert changed(model, then, free, frozen=True) == 0
    assert changed(model, then, free, frozen=False) == int(free["weight"].sum())


def test_sharded_parameters_hold(tmp_path: object) -> None:
    """Fails if a DTensor is read as a plain tensor, or FSDP2's unsharded root looks like a replaced
    parameter."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small()
        free, then = plant(model), snapshot(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        with Guard(model, free, optimizers=[optimizer]) as guard:
            for _ in range(3):
                loss_of(model).backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                loss_of(model)  # leaves the root unsharded
            guard.check()
            assert guard.steps == 3
        full = {name: p.full_tensor() for name, p in model.named_parameters()}
        for name, parameter in full.items():
            mask = free.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
            assert not (differing(parameter, then[name]) & ~mask).any()
        assert any((full[n] != then[n])[free[n]].any() for n in free)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cuda_holds(dtype: torch.dtype) -> None:
    """Fails if the CUDA path, which widens masks inside its kernels, writes other bits than the
    CPU's."""
    model = small().to("cuda", dtype, memory_format=torch.channels_last)
    free = plant(model)
    then = snapshot(model)
    with Guard(model, free) as guard:
        optimizer = optim.AdamW(model.parameters(), lr=1e-1, weight_decay=1.0, fused=True)
        for _ in range(3):
            model(data()[0].to("cuda", dtype)).float().square().sum().backward()
            optimizer.step()
        guard.check()
    on_device = {name: mask.cuda() for name, mask in free.items()}
    last = {"5.bias": torch.zeros(3, dtype=torch.bool, device="cuda")}
    assert changed(model, then, {**on_device, **last}, frozen=True) == 0
    assert changed(model, then, {**on_device, **last}, frozen=False)
