"""A method's term on two real processes: what one process adds, whatever the loop runs on."""

from __future__ import annotations

import pytest
import torch

from lab import distributed_additive as worker
from lab.methods import ADDITIVE
from lab.processes import Results, each, found_by_ranks, worst

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Where each rank ended with every method; one launch."""
    return found_by_ranks("distributed_additive", tmp_path_factory.mktemp("ranks"))


def agree(results: Results, name: str, alone: dict[str, torch.Tensor]) -> None:
    """Both ranks end alike, and where one process does."""
    first, second = each(results, name)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert worst(first, alone) < 1e-6


@pytest.mark.parametrize("count", worker.COUNTS)
@pytest.mark.parametrize("name", worker.METHODS)
def test_under_ddp_as_in_one_process(results: Results, name: str, count: int) -> None:
    """Fails if a forget sample counts on both ranks or on none, the term is added up instead of
    averaged, a rank without samples is left out, or ranks draw other batches or labels."""
    agree(results, f"ddp {name} {count}", worker.in_a_loop(name, count, worker.plainly))


@pytest.mark.parametrize("name", worker.BY_UNLEARN)
def test_unlearn_on_two_processes(results: Results, name: str) -> None:
    """Fails if `unlearn` trains a method with a term otherwise on two processes, or refuses it."""
    agree(results, f"unlearn {name}", worker.by_unlearn(name))


@pytest.mark.parametrize("name", worker.SHARDED)
def test_sharded_as_in_one_process(results: Results, name: str) -> None:
    """Fails if FSDP2 averages the term once more or not at all, or a shard gets another part."""
    agree(results, f"sharded {name}", worker.in_a_loop(name, 13, worker.plainly))


def test_every_term_is_tried() -> None:
    """Fails if a method that adds a term has no row here."""
    kinds = {type(method) for method in worker.METHODS.values()}
    assert kinds == {type(method) for method in ADDITIVE.values()}
