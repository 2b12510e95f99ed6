"""One row a method: all of them keep the promises of `check_method`; each does what is its own."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.data.losses import cross_entropy
from deepclean_hooks.methods.teachers import fresh
from deepclean_hooks.methods.term import Drawn, Term
from deepclean_hooks.methods.training import Step
from deepclean_hooks.stored.bits import differing
from deepclean_hooks.testing import CHECKS, network, sets
from lab.methods import METHODS

# A reset of parameters that BatchNorm precedes leaves dead entries now and then.
pytestmark = pytest.mark.filterwarnings("ignore:.* of the reset entries are dead:UserWarning")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_method_keeps_its_promises(name: str, check: object) -> None:
    """Fails if a method changes what it may not, trains what is held, or depends on batches."""
    check(METHODS[name])


def unlearned(method: deepclean.Method, model: nn.Module, **options: object) -> deepclean.Report:
    """The report of a whole run of `unlearn` on the checks' sets."""
    forget, retain = sets()
    options = {"epochs": 2, "batch_size": 10, "scores": False, **options}
    return deepclean.unlearn(model, forget, retain, method=method, progress=False, **options)


def test_retrain_keeps_no_value() -> None:
    """Fails if any parameter or running statistic survives retraining from scratch."""
    model, original = network(), network()
    run = deepclean.Session(model, deepclean.Retrain(), scores=False).measure(*sets())
    run.select()
    run.reset()
    for name, p in model.named_parameters():
        assert differing(p, original.get_parameter(name)).all(), name
    assert (model.norm.running_mean == 0).all()
    assert (model.norm.running_var == 1).all()
    assert not torch.equal(fresh(original, seed=1).conv.weight, fresh(original, seed=0).conv.weight)


def test_retrain_names_what_it_cannot_reset() -> None:
    """Fails if a raw parameter quietly keeps what it learned, or `build` may make another net."""

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(3)), nn.Sequential(nn.Linear(3, 3))
            self.inner.shift = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"resets scale, inner.shift; pass Retrain\(build="):
        fresh(Raw(), seed=0)
    assert fresh(Raw(), seed=0, build=Raw).scale.shape == (3,)
    with pytest.raises(ValueError, match="a network with other parameters, for instance"):
        fresh(Raw(), seed=0, build=lambda: nn.Linear(3, 3))


def drawn(data: TensorDataset, step: int = 0) -> Drawn:
    """A forget batch of a whole set."""
    every = torch.arange(len(data))
    return Drawn(data.tensors, every, every, step)


def term_of(method: deepclean.Method) -> Term:
    """A run's term, prepared from the checks' network."""
    run = deepclean.Session(network(), method, scores=False).measure(*sets())
    run.select()
    run.reset()
    return run._reset().term


def loss(model: nn.Module, data: TensorDataset) -> Tensor:
    """The plain mean loss."""
    x, y = data.tensors
    return F.cross_entropy(model.eval()(x), y)


@pytest.mark.parametrize(("epoch", "share"), [(0, 1.0), (1, 0.75), (3, 0.25), (4, 0.0)])
def test_l1_weight_decays_linearly(epoch: int, share: float) -> None:
    """Fails if the penalty leaves parameters out, does not decay, or stays in the last epochs."""
    method = deepclean.L1Sparse(weight=0.01, epochs_without=1, epochs=5, steps_per_epoch=3)
    model, reference = network(), network()
    length = torch.stack([p.abs().sum() for p in reference.parameters()]).sum()
    (loss(reference, sets()[1]) + 0.01 * share * length).backward()
    loss(model, sets()[1]).backward()
    named = dict(model.named_parameters())
    for step in (3 * epoch, 3 * epoch + 2):
        held = {name: p.grad.clone() for name, p in named.items()}
        method.term().adjust(named, step)
        for name, p in named.items():
            torch.testing.assert_close(p.grad, reference.get_parameter(name).grad)
            p.grad = held[name]


def test_l1_asks_a_loop_how_long_it_trains() -> None:
    """Fails if the weight stays where it is, or falls at once, because the length is unknown, or
    `unlearn` asks for what it knows."""
    with pytest.raises(ValueError, match=r"pass L1Sparse\(epochs=..., steps_per_epoch=...\)"):
        deepclean.L1Sparse().require_plain_training()
    report = unlearned(deepclean.L1Sparse(), network())
    assert (report.settings["epochs"], report.settings["steps_per_epoch"]) == (2, 3)


def test_neggrad_is_a_weighted_difference_and_clipped() -> None:
    """Fails if the forget term has the wrong sign or weight, or gradients are not clipped."""
    forget, retain = sets()
    model = network().eval()
    term = term_of(deepclean.NegGradPlus(retain_weight=0.7, clip=0.01))
    added = term.losses(model, cross_entropy, drawn(forget)).mean()
    assert added.item() == pytest.approx(-0.3 * loss(model, forget).item(), rel=1e-5)
    assert term.of_yours == 0.7
    (term.of_yours * loss(model, retain) + added).backward()
    term.adjust(dict(model.named_parameters()), 0)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["RandomLabel", "SalUn", "Amnesiac"])
def test_relabelling(name: str) -> None:
    """Fails if Amnesiac's labels are ever true or change, RandomLabel's are not drawn anew at each
    step, or a sample of D_f does not count as much as one of D_r."""
    forget, _ = sets()
    y, term = forget.tensors[1], term_of(METHODS[name])
    labels = [term.labels(drawn(forget, step), y, 4) for step in range(2)]
    assert torch.equal(*labels) == (name == "Amnesiac")
    assert (labels[0] == y).any() == (name != "Amnesiac")
    assert len(set(labels[0].tolist())) > 1
    model = network().eval()
    expected = F.cross_entropy(model(forget.tensors[0]), labels[0], reduction="none") * 10 / 30
    torch.testing.assert_close(term.losses(model, cross_entropy, drawn(forget)), expected)


def order(method: deepclean.Method) -> str:
    """The sets of an epoch's steps: f or r each."""
    training = method.training(network(), None, cross_entropy)
    forget, retain = (DataLoader(data, batch_size=4) for data in sets())
    steps = list(training.steps(forget, retain, 0))
    assert len(steps) == training.length(forget, retain)
    assert sum(len(step.batch[1]) for step in steps) == 40
    return "".join("f" if step.of_forget else "r" for step in steps)


def test_published_order_of_relabelled_batches() -> None:
    """Fails if RandomLabel mixes, Amnesiac does not, or a batch is left out."""
    assert order(deepclean.RandomLabel(as_published=True)) == "fff" + "r" * 8
    assert order(deepclean.SalUn(as_published=True)) == "fff" + "r" * 8
    mixed = order(deepclean.Amnesiac(as_published=True))
    assert sorted(mixed) == sorted("fff" + "r" * 8)
    assert mixed != "fff" + "r" * 8


def test_salun_trains_the_salient_share_and_resets_nothing() -> None:
    """Fails if the least salient entries are taken, the share is per layer, or values change."""
    model, original = network(), network()
    run = deepclean.Session(model, deepclean.SalUn(share=0.3), scores=False).measure(*sets())
    run.select()
    run.reset()
    assert not any(
        differing(p, original.get_parameter(n)).any() for n, p in model.named_parameters()
    )
    x, y = sets()[0].tensors
    gradients = torch.autograd.grad(
        F.cross_entropy(original.eval()(x), y), list(original.parameters())
    )
    flat = torch.cat([g.abs().flatten() for g in gradients])
    mask = torch.cat([run.selection.masks[n].flatten() for n, _ in original.named_parameters()])
    assert int(mask.sum()) == pytest.approx(0.3 * len(flat), abs=1)
    assert flat[mask].min() > 0.999 * flat[~mask].max()


def test_msg_draws_the_smallest_gradients_anew_and_slows_the_rest() -> None:
    """Fails if the largest are drawn, other layers are, or kept kernels learn at full speed."""
    model, original = network(), network()
    method = deepclean.MSG(share=0.25, slow=0.1)
    run = deepclean.Session(model, method, scores=False).measure(*sets())
    run.select()
    run.reset()
    mask = run.selection.masks["conv.weight"]
    assert int(mask.sum()) == pytest.approx(0.25 * mask.numel(), abs=1)
    for name, p in model.named_parameters():
        assert differing(p, original.get_parameter(name)).any() == (name == "conv.weight")
    weight = original.eval().conv.weight
    forget, retain = (
        torch.autograd.grad(F.cross_entropy(original(d.tensors[0]), d.tensors[1]), weight)[0]
        for d in sets()
    )
    g = (retain - forget).abs()
    assert g[mask].max() <= 1.001 * g[~mask].min()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    run._reset().term.adjust(dict(model.named_parameters()), 0)
    assert (model.conv.weight.grad[mask] == 1).all()
    assert torch.allclose(model.conv.weight.grad[~mask], torch.tensor(0.1))
    assert (model.head.weight.grad == 1).all()


def expected_fisher(data: object) -> dict[str, Tensor]:
    """The definition: every class of every sample, weighted by its probability, in float64."""
    model = network(torch.float64).eval()
    named = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    for x in data.tensors[0].double():
        chances = model(x[None]).softmax(1)[0].detach()
        for y in range(4):
            loss = F.cross_entropy(model(x[None]), torch.tensor([y]))
            found = torch.autograd.grad(loss, list(named.values()))
            for n, g in zip(named, found, strict=True):
                total[n] += chances[y] * g**2
    return {n: t / len(data) for n, t in total.items()}


def test_fisher_forgetting_adds_the_published_noise() -> None:
    """Fails if F takes the data's labels or D_f, or the bounds, averages or factors are others."""
    retain = sets()[1]
    fisher = expected_fisher(retain)
    method = deepclean.FisherForgetting(classes=4, alpha=1e-4, forgotten_class=0, seed=5)
    model, original = network(), network()
    run = deepclean.Session(model, method, scores=False).measure(*sets())
    for name, found in run.measured.retain.mean().items():
        torch.testing.assert_close(found, fisher[name], rtol=1e-3, atol=1e-9)
    run.select()
    run.reset()
    random = torch.Generator().manual_seed(5)
    for name, p in original.named_parameters():
        head = name.startswith("head")
        variance = (1 / (fisher[name] + 1e-8)).clamp_max(1e2 if head else 1e3) * 1e-4
        if p.dim() > 1:
            variance = variance.mean(1, keepdim=True).expand_as(variance).clone()
        variance = variance * (10 if head or p.dim() == 1 else 1)
        mean = p.detach().clone()
        if head:
            mean[0], variance[0] = 0, 1e-3  # their factor 10 for the last layer comes after 1e-4
        expected = mean + variance.sqrt().float() * torch.randn(p.shape, generator=random)
        torch.testing.assert_close(
            model.get_parameter(name).detach(), expected, rtol=1e-3, atol=1e-5
        )


def test_fisher_mask_resets_whole_kernels_by_difference() -> None:
    """Fails if a ratio is taken, entries of a kernel part, or one-dimensional ones are reset."""
    model = network()
    run = deepclean.Session(model, deepclean.FisherMask(classes=4, share=0.1), scores=False)
    run.measure(*sets()).select()
    masks = run.selection.masks
    own, other = expected_fisher(sets()[0]), expected_fisher(sets()[1])
    score = {n: own[n] - other[n] for n in own if own[n].dim() > 1}
    score["conv.weight"] = score["conv.weight"].mean((2, 3), keepdim=True).expand(6, 1, 3, 3)
    chosen = torch.cat([s[masks[n]] for n, s in score.items()])
    left = torch.cat([s[~masks[n]] for n, s in score.items()])
    assert 0.1 * (len(chosen) + len(left)) <= len(chosen) + 1e-6 + 9
    assert chosen.min() > left.max() - 1e-6
    assert all(len(set(kernel.flatten().tolist())) == 1 for kernel in masks["conv.weight"])
    assert not any(mask.any() for mask in masks.values() if mask.dim() == 1)


def softened(net: nn.Module, x: Tensor, temperature: float) -> Tensor:
    """Probabilities at a temperature."""
    return (net.eval()(x) / temperature).softmax(1)


def kl(teacher: nn.Module, model: nn.Module, x: Tensor, temperature: float) -> Tensor:
    """KL(teacher || model) of each sample, by its definition."""
    p, q = softened(teacher, x, temperature), softened(model, x, temperature)
    return (p * (p.log() - q.log())).sum(1)


def moved() -> nn.Module:
    """The checks' network, somewhat trained."""
    model = network().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    return model


def test_bad_teaching_has_the_teacher_of_each_set() -> None:
    """Fails if the teachers are exchanged, KL is turned round, or divided by the classes, or the
    sets come in batches of their own as they are published."""
    forget, retain = sets()
    method = deepclean.BadTeaching(temperature=2.0, seed=7, as_published=True)
    training = method.training(network(), None, cross_entropy)
    loaders = (DataLoader(data, batch_size=8) for data in (forget, retain))
    steps = list(training.steps(*loaders, 0))
    assert torch.cat([step.of_forget for step in steps]).sum() == 10
    assert [len(step.of_forget) for step in steps] == [8, 8, 3]  # 10 and 30 % of 30
    assert any(0 < step.of_forget.sum() < len(step.of_forget) for step in steps)
    for step in steps:
        x, y = step.batch
        assert torch.equal(step.of_forget, y == 0)
        bad = kl(fresh(network(), seed=7), moved(), x, 2.0)
        good = kl(network(), moved(), x, 2.0)
        expected = torch.where(y == 0, bad, good).mean()
        torch.testing.assert_close(training.objective(moved(), step), expected)


def test_bad_teaching_adds_its_half_on_the_forget_set() -> None:
    """Fails if the half that a loop adds has another teacher, or one that learns with the model;
    also after a resume, where the teacher is made again."""
    forget, _ = sets()
    method = deepclean.BadTeaching(temperature=2.0, seed=7, weight=0.5)
    expected = 0.5 * kl(fresh(network(), seed=7), moved(), forget.tensors[0], 2.0)
    for term in (term_of(method), method.term()):
        found = term.losses(moved(), cross_entropy, drawn(forget))
        torch.testing.assert_close(found, expected)


def test_scrub_goes_away_first_and_back_after() -> None:
    """Fails if the forget sign, T^2, the weights or the epochs with forget batches are wrong."""
    forget, retain = sets()
    method = deepclean.SCRUB(alpha=0.5, gamma=0.9, temperature=4.0, forget_epochs=2)
    training = method.training(network(), None, cross_entropy)

    def away(x: Tensor) -> float:
        return 16 * kl(network(), moved(), x, 4.0).mean().item()

    gone = training.objective(moved(), Step(forget.tensors, True, 0)).item()
    assert gone == pytest.approx(-away(forget.tensors[0]), rel=1e-4)
    kept = training.objective(moved(), Step(retain.tensors, False, 0)).item()
    plain = loss(moved(), retain).item()
    assert kept == pytest.approx(0.9 * plain + 0.5 * away(retain.tensors[0]), rel=1e-4)
    loaders = [DataLoader(data, batch_size=10) for data in sets()]
    orders = [
        "".join("f" if step.of_forget else "r" for step in training.steps(*loaders, epoch))
        for epoch in range(3)
    ]
    assert orders == ["frrr", "frrr", "rrr"]


def test_ct_transposes_kernels() -> None:
    """Fails if anything but square kernels changes, or a model without any passes."""
    model, original = network(), network()
    run = deepclean.Session(model, deepclean.CT(), scores=False).measure(*sets())
    run.select()
    run.reset()
    for name, p in model.named_parameters():
        expected = original.get_parameter(name)
        assert torch.equal(p, expected.transpose(2, 3) if name == "conv.weight" else expected)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(ValueError, match="this model has none larger than 1 x 1; use another"):
        deepclean.Session(flat, deepclean.CT(), scores=False).measure(*sets()).select()


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.own_training])
def test_own_objective_trains_in_unlearn_only(name: str) -> None:
    """Fails if a loop of one's own runs a method without its objective, or `unlearn` does not
    train by it: the same recipe on the plain loss must end elsewhere."""
    method, model, plain = METHODS[name], network(), network()
    forget, retain = sets()
    with (
        pytest.raises(ValueError, match=rf"use unlearn\(.*method={type(method).__name__}\("),
        deepclean.unlearning(model, forget=forget, retain=retain, method=method),
    ):
        pass
    report = unlearned(method, model)
    assert report.frozen_entries_moved == 0
    unlearned(deepclean.FineTune(), plain)
    assert not torch.equal(model.head.weight, plain.head.weight)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.own_training])
def test_plain_methods_run_around_a_loop(name: str) -> None:
    """Fails if a method whose training is the user's loss cannot run around the user's loop."""
    model = network()
    forget, retain = sets()
    with deepclean.unlearning(
        model, forget=forget, retain=retain, method=METHODS[name], scores=False
    ) as run:
        x, y = retain.tensors
        optimizer = torch.optim.Adam(model.parameters())
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert run.report.frozen_entries_moved == 0


def test_another_optimizer() -> None:
    """Fails if `unlearn` trains by Adam although another optimizer was asked for."""
    sgd, adam = network(), network()
    unlearned(deepclean.FineTune(), sgd, optimizer=partial(torch.optim.SGD, lr=1e-4))
    unlearned(deepclean.FineTune(), adam)
    before: Tensor = network().head.weight
    assert 0 < (sgd.head.weight - before).abs().max() < (adam.head.weight - before).abs().max()


def test_forgetting_lowers_forget_accuracy() -> None:
    """Fails if a method that trains on the forget set with other labels trains towards its own."""
    model = network()
    x, y = (torch.cat(t) for t in zip(*(d.tensors for d in sets()), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    forget, retain = sets()

    def accuracy(net: nn.Module, data: object) -> float:
        return float((net.eval()(data.tensors[0]).argmax(1) == data.tensors[1]).double().mean())

    assert accuracy(model, forget) == 1
    for method in (deepclean.Amnesiac(), deepclean.NegGradPlus(retain_weight=0.5)):
        net = copy.deepcopy(model)
        unlearned(method, net, epochs=15, lr=3e-3)
        assert accuracy(net, forget) < 0.5, method.name
        assert accuracy(net, retain) > 0.8, method.name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(deepclean.L1Sparse, weight=0), "weight must be a positive number, got 0"),
        (partial(deepclean.L1Sparse, epochs_without=-1), "must not be negative, got -1"),
        (partial(deepclean.NegGradPlus, retain_weight=1.5), "at most 1, got 1.5"),
        (partial(deepclean.NegGradPlus, clip=0), "clip must be a positive number"),
        (partial(deepclean.SalUn, share=0), "share must be above 0 and at most 1, got 0"),
        (partial(deepclean.MSG, share=2), "share must be above 0 and at most 1, got 2"),
        (partial(deepclean.MSG, slow=-1), "slow must be 0 to 1, got -1"),
        (partial(deepclean.BadTeaching, share=0), "share must be above 0 and at most 1, got 0"),
        (partial(deepclean.SCRUB, alpha=0), "alpha must be a positive number, got 0"),
        (partial(deepclean.SCRUB, forget_epochs=0), "forget_epochs must be 1 at least, got 0"),
        (partial(deepclean.FisherForgetting, 4, forgotten_class=4), "must be 0 to 3, got 4"),
        (partial(deepclean.FisherMask, 4, share=2), "share must be above 0 and at most 1, got 2"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    """Fails if a hyper-parameter that means nothing is taken."""
    with pytest.raises(ValueError, match=message):
        make()
