"""Selective Synaptic Dampening: the published algorithm, its variants, what is exact in ours."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import deepclean_hooks as deepclean
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.measure.batch_mean import BatchMean, OutputMagnitude
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.measure.request import Request
from deepclean_hooks.methods import ASSD, LFSSD, SSD
from deepclean_hooks.stored.bits import differing
from lab import small
from lab.reference import squared_gradients


def network() -> nn.Module:
    """In eval mode, with statistics of data that it has seen."""
    model = small.network(8)
    model[1].running_mean.normal_(0, 0.2)
    return model.eval()


def samples(start: int, stop: int, kind: torch.dtype = torch.float32) -> TensorDataset:
    """Samples start..stop of 53, the first 9 of class 0 and shifted apart."""
    x, y = small.samples(0, 53, of=53).tensors
    x[:9] += 1.5
    y[:9] = 0
    return TensorDataset(x[start:stop].to(kind), y[start:stop])


FORGET, RETAIN = samples(0, 9), samples(9, 53)


def unlearned(model: nn.Module, method: SSD, **options: object) -> dict[str, Tensor]:
    """The parameters after a whole session without training."""
    options = {"scores": False, "batch_size": 7, **options}
    run = deepclean.Session(model, method, **options).measure(FORGET, RETAIN)
    run.select()
    run.reset().guard()
    report = run.finish()
    assert report.frozen_entries_moved == 0
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def published(
    model: nn.Module,
    forget: Dataset,
    retain: Dataset,
    alpha: float,
    dampening: float,
    exponent: float,
    batch_size: int,
    magnitude: bool = False,
) -> dict[str, Tensor]:
    """The published algorithm written anew: batch means through `.grad`, float32, plain loops."""

    def importance(data: Dataset) -> dict[str, Tensor]:
        loader = DataLoader(data, batch_size=batch_size, shuffle=False)
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for x, y in loader:
            model.zero_grad()
            out = model(x)
            loss = out.norm(p=2, dim=1).pow(2).mean() if magnitude else F.cross_entropy(out, y)
            loss.backward()
            for n, p in model.named_parameters():
                total[n] += p.grad.abs() if magnitude else p.grad.pow(2)
        model.zero_grad()
        return {n: t / float(len(loader)) for n, t in total.items()}

    own, whole = importance(forget), importance(ConcatDataset([retain, forget]))
    result = {}
    for n, p in model.named_parameters():
        new = p.detach().clone()
        at = torch.where(own[n] > whole[n] * alpha)
        update = ((whole[n] * dampening) / own[n])[at] ** exponent
        update[update > 1] = 1
        new[at] = new[at] * update
        result[n] = new
    return result


@pytest.mark.parametrize(
    ("alpha", "dampening", "exponent", "batch_size"),
    [(1.5, 1.0, 1.0, 8), (2.0, 0.5, 2.0, 5), (0.5, 1.0, 1.0, 64), (3.0, 4.0, 0.5, 7)],
)
def test_batch_mean_equals_the_published_algorithm_bit_for_bit(
    alpha: float, dampening: float, exponent: float, batch_size: int
) -> None:
    """Fails if batches, their order, the average, the threshold or the dampening differ."""
    model = network()
    expected = published(model, FORGET, RETAIN, alpha, dampening, exponent, batch_size)
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = unlearned(model, SSD(alpha, dampening, exponent, BatchMean(batch_size)))
    assert sum(int(differing(p, original[n]).sum()) for n, p in found.items()) > 20
    assert not any(differing(p, expected[n]).any() for n, p in found.items())


def test_loss_free_equals_the_published_algorithm() -> None:
    """Fails if importance squares the gradient, reads labels, or averages otherwise."""
    model = network()
    expected = published(model, FORGET, RETAIN, 1.2, 1.0, 1.0, 8, magnitude=True)
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = unlearned(model, LFSSD(alpha=1.2, estimator=OutputMagnitude(8)))
    assert sum(int(differing(p, original[n]).sum()) for n, p in found.items()) > 20
    for n, p in found.items():
        # norm().pow(2) and the sum of squares differ in the last bits.
        torch.testing.assert_close(p, expected[n], rtol=1e-5, atol=1e-7)


def test_exact_equals_the_definition() -> None:
    """Fails if I_D is of D_r alone, is not a mean over |D| samples, or squares batch means."""
    model = network().double()
    own = squared_gradients(model, *samples(0, 9, torch.float64).tensors)
    whole = squared_gradients(model, *samples(0, 53, torch.float64).tensors)
    expected = {}
    for n, p in model.named_parameters():
        own_mean, whole_mean = own[n] / 9, whole[n] / 53
        factor = (0.7 * whole_mean / own_mean).clamp_max(1)
        expected[n] = torch.where(own_mean > 1.3 * whole_mean, p * factor, p).detach()
    run = deepclean.Session(model, SSD(1.3, 0.7), scores=False)
    run.measure(samples(0, 9, torch.float64), samples(9, 53, torch.float64)).select()
    run.reset()
    changed = sum(int((p != expected[n]).sum()) for n, p in network().double().named_parameters())
    assert changed > 20
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-10, atol=1e-14)


def test_only_the_exact_estimator_is_free_of_the_batch_size() -> None:
    """Fails if exact SSD changes with the loader; the compatibility estimator must."""

    def selected(method: SSD, batch_size: int) -> dict[str, Tensor]:
        model = network().double()
        run = deepclean.Session(model, method, scores=False, batch_size=batch_size)
        run.measure(samples(0, 9, torch.float64), samples(9, 53, torch.float64)).select()
        return run.selection.masks

    one, other = selected(SSD(2.0), 3), selected(SSD(2.0), 44)
    assert sum(int(m.sum()) for m in one.values()) > 20
    assert all(torch.equal(m, other[n]) for n, m in one.items())
    one, other = (selected(SSD(1.2, estimator=BatchMean(size)), 8) for size in (3, 5))
    assert any(not torch.equal(m, other[n]) for n, m in one.items())


def measurement(own: list[float], whole: list[float]) -> tuple[deepclean.FisherDiagonal, ...]:
    """Diagonals of D_f and D_r, 1 and 3 samples, whose I_Df and I_D are these."""
    f, d = (torch.tensor([v], dtype=torch.float64) for v in (own, whole))
    settings = {"computed": "float64"}
    one = deepclean.FisherDiagonal({"w": f}, 1, torch.zeros(1).long(), settings)
    rest = deepclean.FisherDiagonal({"w": 4 * d - f}, 3, torch.ones(3).long(), settings)
    return one, rest


def test_zeros_ties_and_the_bound() -> None:
    """Fails if 0/0 is selected or its NaN written, x/0 does not become 0, a tie is selected, or a
    weight grows."""
    forget, retain = measurement([0, 4, 4, 8, 1, 8], [0, 0, 2, 2, 1, 1])
    method = SSD(alpha=2.0, dampening=3.0)
    selection = method.select(forget, retain)
    assert selection.masks["w"].tolist() == [[False, True, False, True, False, True]]
    values = method.new_values({"w": torch.full((1, 6), 2.0)}, selection, forget, retain)["w"]
    assert values[selection.masks["w"]].tolist() == [0.0, 1.5, 0.75]
    bound = SSD(alpha=2.0, dampening=100.0).new_values(
        {"w": torch.full((1, 6), 2.0)}, selection, forget, retain
    )
    assert bound["w"][0, 3] == 2.0


@pytest.mark.parametrize("forgotten", [1, 9, 30])
def test_adaptive_dampens_its_share(forgotten: int) -> None:
    """Fails if the share is not ln(1 + 100 |D_f| / |D|) per cent, or of the lowest ratios."""
    forget, retain = samples(0, forgotten, torch.float64), samples(forgotten, 53, torch.float64)
    run = deepclean.Session(network().double(), ASSD(), scores=False).measure(forget, retain)
    own, whole = run.measured.forget.mean(), (run.measured.forget + run.measured.retain).mean()
    report = run.select()
    expected = math.log(1 + 100 * forgotten / 53) / 100 * report.trainable_entries
    assert abs(report.selected_entries - expected) <= 1
    masks = run.selection.masks
    ratio = {n: torch.where(own[n] > 0, own[n] / whole[n], 0.0) for n in own}
    lowest = min(float(ratio[n][m].min()) for n, m in masks.items() if m.any())
    assert all(float(ratio[n][~m].max()) <= lowest for n, m in masks.items() if not m.all())


def test_adaptive_ranks_only_entries_that_a_sample_uses() -> None:
    """Fails if entries that are 0 / 0 (a pixel that is black everywhere, a dead channel) count
    among those of which the share is taken: the cut then lies too low."""
    generator = torch.Generator().manual_seed(0)
    own, kept = (torch.rand(2, 5000, generator=generator, dtype=torch.float64) for _ in range(2))
    own[0], kept[0] = 0, 0
    ids = torch.arange(100)
    settings = {"computed": "float64"}
    forget = Measurement({"w": own}, 10, ids[:10], settings)
    retain = Measurement({"w": kept}, 90, ids[10:], settings)
    chosen = ASSD().select(forget, retain).masks["w"]
    assert not chosen[0].any()
    assert int(chosen.sum()) == round(5000 * math.log(11) / 100) == 120


def test_stored_diagonal_of_the_whole_training_set() -> None:
    """Fails if a stored diagonal of D gives other weights than D_r does, or serves batch means."""
    model = network()
    direct = unlearned(network(), SSD(1.5))
    stored = deepclean.fisher_diagonal(model, samples(0, 53))
    run = deepclean.Session(model, SSD(1.5), scores=False).measure(FORGET, stored)
    run.select()
    run.reset()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), direct[n])
    for method in (SSD(estimator=BatchMean()), LFSSD()):
        with pytest.raises((ValueError, TypeError), match="pass the retain set"):
            deepclean.Session(network(), method, scores=False).measure(FORGET, stored)


def test_stored_batch_means_of_the_whole_training_set() -> None:
    """Fails if a stored importance of D, the order of its batches the published one, gives other
    bits than walking D, or one that lacks forget samples is taken."""
    method = SSD(1.5, estimator=BatchMean(batch_size=8))
    direct = unlearned(network(), method)

    def stored(*parts: Dataset) -> Measurement:
        source = samples_of(ConcatDataset(parts), batch_size=8)
        return method.estimator(Request(network(), source, parameters=method.may_select))

    model = network()
    run = deepclean.Session(model, method, scores=False)
    run.measure(FORGET, stored(RETAIN, FORGET)).select()
    run.reset()
    assert run.report.retain_samples == len(RETAIN)
    assert all(torch.equal(p, direct[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="not in the stored measurement"):
        deepclean.Session(network(), method, scores=False).measure(FORGET, stored(RETAIN))


def test_fine_tuning_may_follow() -> None:
    """Fails if nothing can train although it was asked for, or something can without."""

    def moved(method: SSD) -> int:
        model = network()
        run = deepclean.Session(model, method, scores=False).measure(FORGET, RETAIN)
        run.select()
        run.reset().guard()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        F.cross_entropy(model(RETAIN.tensors[0]), RETAIN.tensors[1]).backward()
        optimizer.step()
        run.finish()
        return sum(int(differing(p, before[n]).sum()) for n, p in model.named_parameters())

    assert moved(SSD(1.5)) == 0
    assert moved(SSD(1.5, fine_tune=True)) > 0


def test_unlearn_ends_without_training() -> None:
    """Fails if `unlearn` trains, or needs to, where no entry may train."""
    model = network()
    report = deepclean.unlearn(model, FORGET, RETAIN, method=SSD(1.5), scores=False)
    assert report.optimizer_steps == 0
    assert report.selected_entries > 0
    assert report.frozen_entries_moved == 0
    assert torch.equal(model[1].running_mean, network()[1].running_mean)


def test_overlap_is_counted_for_batch_means_too() -> None:
    """Fails if forget samples in the retain set go unseen where D is walked as one."""
    run = deepclean.Session(network(), SSD(estimator=BatchMean(8)), scores=False)
    with pytest.warns(UserWarning, match="2 of the 9 forget samples stand in the retain set"):
        run.measure(FORGET, samples(7, 53))
    assert (run.report.forget_samples, run.report.retain_samples) == (9, 46)
    everything = samples(0, 53)
    with pytest.raises(ValueError, match="3 samples stand in both"):
        deepclean.Session(network(), SSD(estimator=BatchMean(8)), scores=False).measure(
            Subset(everything, range(3)), everything
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(SSD, alpha=0), "alpha must be a positive number, got 0"),
        (partial(SSD, dampening=-1.0), "dampening must be a positive number, got -1.0"),
        (partial(SSD, exponent=math.inf), "exponent must be a positive number, got inf"),
        (partial(SSD, estimator=OutputMagnitude()), "use LFSSD"),
        (partial(LFSSD, estimator=BatchMean()), "estimator must be OutputMagnitude"),
        (partial(ASSD, dampening=0), "dampening must be a positive number"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    """Fails if a value that means nothing is taken, or an estimator of another method."""
    with pytest.raises(ValueError, match=message):
        make()


def test_an_alpha_out_of_reach_is_refused() -> None:
    """Fails if the paper's alpha passes where the exact Fisher cannot exceed it, so that nothing is
    unlearned; just below the bound it must pass."""
    run = deepclean.Session(network(), SSD(alpha=53 / 9), scores=False).measure(FORGET, RETAIN)
    with pytest.raises(ValueError, match=r"selects nothing: 9 of 53 samples .* use ASSD\(\)"):
        run.select()
    forget, retain = measurement([1.0], [0.2500001])
    SSD(alpha=3.9).select(forget, retain)


def test_shuffled_batch_means_are_reproducible() -> None:
    """Fails if the seed does not fix the order, or is ignored."""
    one = unlearned(network(), SSD(1.5, estimator=BatchMean(8, seed=3)))
    again = unlearned(network(), SSD(1.5, estimator=BatchMean(8, seed=3)))
    other = unlearned(network(), SSD(1.5, estimator=BatchMean(8, seed=4)))
    assert not any(differing(p, again[n]).any() for n, p in one.items())
    assert any(differing(p, other[n]).any() for n, p in one.items())
