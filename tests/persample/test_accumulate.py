"""Sums over batches: in float64 whatever the layout, with a scratch for large parameters only."""

import pytest
import torch
from torch import Tensor

from deepclean_hooks.persample import accumulate
from deepclean_hooks.persample.accumulate import Sums
from deepclean_hooks.persample.outer import Product

BATCHES = 40  # two flushes and a rest


def squares(shape: tuple[int, ...], channels_last: bool) -> list[Tensor]:
    """Float32 sums of squares of BATCHES batches, as a contiguous or a permuted tensor."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.rand(shape, generator=generator) ** 2 for _ in range(BATCHES)]
    if channels_last:
        made = [one.contiguous(memory_format=torch.channels_last) for one in made]
    return made


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_sums_over_many_batches(
    large: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a batch is lost, added in the wrong order of memory, or rounded to float32."""
    shape = (5, 3, 4, 7)
    monkeypatch.setattr(accumulate, "SCRATCH_FROM", 1 if large else 1 << 20)
    monkeypatch.setattr(accumulate, "CONVERTED", 64)  # 420 entries: six pieces and a rest
    sums = Sums({"w": torch.zeros(shape)}, torch.float64)
    added = squares(shape, channels_last)
    truth = torch.stack([one.double() for one in added]).sum(0)
    for one in added:
        sums.add("w", one)
        assert bool(sums.scratch) == large
        sums.end_batch()
    error = float(((sums.totals()["w"] - truth) / truth.max()).abs().max())
    assert error <= (1e-6 if large else 1e-15)
    assert not sums.scratch


def test_a_batch_in_another_order_of_memory() -> None:
    """Fails if entries are added by where they lie instead of by their index."""
    shape = (5, 3, 4, 7)
    sums = Sums({"w": torch.zeros(shape)}, torch.float64)
    one, other = squares(shape, False)[0], squares(shape, True)[1]
    sums.add("w", one.clone())
    sums.add("w", other.clone())
    assert torch.equal(sums.totals()["w"], one.double() + other.double())


def test_what_a_rule_added_itself_is_not_added_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a scratch that came back is counted twice, or a product beside it is lost."""
    monkeypatch.setattr(accumulate, "SCRATCH_FROM", 1)
    sums = Sums({"w": torch.zeros(2, 3)}, torch.float64)
    sums.add("w", torch.ones(2, 3))
    sums.add("w", sums.scratch["w"].add_(2))
    sums.add("w", Product(torch.ones(4, 2), torch.ones(4, 3)))
    assert torch.equal(sums.take("w"), torch.full((2, 3), 7.0, dtype=torch.float64))
