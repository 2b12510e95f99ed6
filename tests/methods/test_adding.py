"""What is drawn of the forget set at each step, and what drawing leaves alone."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import deepclean_hooks as deepclean
from deepclean_hooks.data.samples import samples_of
from deepclean_hooks.methods.adding import Adding, positions
from deepclean_hooks.methods.term import Drawn, Term
from deepclean_hooks.testing import network, sets


def batches(count: int, size: int, seed: int, first: int, many: int) -> list[list[int]]:
    """The first so many batches from one on."""
    return [b.tolist() for b in itertools.islice(positions(count, size, seed, first), many)]


@pytest.mark.parametrize(("count", "size"), [(13, 5), (5, 5), (1, 1), (7, 3), (3, 2)])
def test_every_pass_has_each_sample_once_in_an_order_of_its_own(count: int, size: int) -> None:
    """Fails if a sample is left out because batches end between passes, or every pass is alike."""
    drawn = list(itertools.chain(*batches(count, size, 4, 0, 6 * count)))
    passes = [drawn[at : at + count] for at in range(0, 6 * size * count, count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    assert count < 3 or len({tuple(one) for one in passes}) > 2
    assert count < 3 or drawn[:count] != list(itertools.chain(*batches(count, size, 5, 0, count)))


def test_it_goes_on_where_a_run_was_stored() -> None:
    """Fails if the batches after a resume are not those that were next."""
    whole = batches(13, 5, 2, 0, 20)
    for first in (1, 7, 19):
        assert batches(13, 5, 2, first, 20 - first) == whole[first:]


class Restless(Dataset[tuple[Tensor, Tensor]]):
    """Draws from every global generator whenever a sample is read."""

    def __init__(self) -> None:
        self.data = sets()[0]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[i]
        return x + random.random() + np.random.rand() + torch.rand(()).float(), y


class Sees(Term):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def losses(self, model: torch.nn.Module, loss_fn: Any, drawn: Drawn) -> Tensor:
        self.seen.append(drawn.batch[0].clone())
        return loss_fn(model, drawn.batch)


def test_the_loops_random_states_are_left_alone() -> None:
    """Fails if a transform of the forget set moves the loop's own draws, is given the same numbers
    at every step, or others when the run is repeated."""
    runs = []
    for _ in range(2):
        model, term = network(), Sees()
        adding = Adding(term, model, samples_of(Restless(), batch_size=10), loss)
        then = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        for _ in range(3):
            adding(None, dict(model.named_parameters()), False)
        assert random.getstate() == then[0]
        assert (np.random.get_state()[1] == then[1]).all()
        assert torch.equal(torch.get_rng_state(), then[2])
        runs.append(term.seen)
        random.random(), np.random.rand(), torch.rand(())
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert len({round(float(x.sum()), 3) for x in runs[0]}) == 3


def loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_the_gradient_that_is_there_stays_and_the_mean_is_added() -> None:
    """Fails if the loop's gradient is overwritten, or a batch counts by its size."""
    model, reference = network(), network()
    adding = Adding(Sees(), model, samples_of(sets()[0], batch_size=4), loss)
    held = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = held[name].clone()
    adding(None, dict(model.named_parameters()), False)
    at = next(positions(10, 4, 0))
    loss(reference, tuple(t[at] for t in sets()[0].tensors)).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, held[name] + reference.get_parameter(name).grad)


def test_a_stream_is_refused() -> None:
    """Fails if samples without indices are drawn in an order that nobody knows."""
    stream = DataLoader(sets()[0], batch_size=None)
    with pytest.raises(ValueError, match="pass a Dataset with a length as the forget set"):
        deepclean.unlearn(
            network(), stream, sets()[1], method=deepclean.NegGradPlus(), scores=False
        )


def test_an_optimizer_inside_the_backward_pass_is_refused() -> None:
    """Fails if the term's own backward pass steps the model half-way through."""
    model = network()
    forget, retain = sets()
    method = deepclean.NegGradPlus()
    with (
        pytest.raises(RuntimeError, match="an optimizer steps inside the backward pass"),
        deepclean.unlearning(model, forget=forget, retain=retain, method=method, scores=False),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.head.bias.register_post_accumulate_grad_hook(lambda p: optimizer.step())
        F.cross_entropy(model(retain.tensors[0]), retain.tensors[1]).backward()
