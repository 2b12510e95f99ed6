"""The estimators of every method on two real processes: what one process finds, or an error."""

from __future__ import annotations

import pytest
import torch

from lab import distributed_estimators as worker
from lab.processes import Results, each, found_by_ranks, worst


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank measured with every estimator; one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    return found_by_ranks("distributed_estimators", folder)


@pytest.mark.parametrize("name", [n for n in worker.ESTIMATORS if n not in worker.REFUSED])
@pytest.mark.parametrize("count", worker.COUNTS)
def test_two_processes_measure_what_one_does(results: Results, name: str, count: int) -> None:
    """Fails if a rank's samples are lost, counted twice or averaged, the ranks differ, or one
    without samples has nothing to add up."""
    alone = worker.measured(worker.ESTIMATORS[name], count)
    for found in each(results, f"{name}, {count}"):
        assert found["sums"].keys() == alone["sums"].keys()
        assert worst(found["sums"], alone["sums"]) < 1e-9
        assert found["count"] == alone["count"] == count
        assert found["ids"] == alone["ids"]
        assert found.get("classes") == alone.get("classes")
    assert any(sums.abs().max() > 0 for sums in alone["sums"].values())
    first, second = each(results, f"{name}, {count}")
    assert all(torch.equal(first["sums"][key], second["sums"][key]) for key in first["sums"])


@pytest.mark.parametrize("name", worker.REFUSED)
def test_what_depends_on_batches_is_refused(results: Results, name: str) -> None:
    """Fails if samples fall into other batches on two ranks than on one, in silence."""
    for one in results:
        assert name in one[f"{name}, 13"]["error"]
        assert "launch one process" in one[f"{name}, 13"]["error"]
