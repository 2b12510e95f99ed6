"""Files that are written whole: what a kill, an error, a umask and a link leave."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepclean_hooks as deepclean
from deepclean_hooks.stored import sealed
from deepclean_hooks.stored.files import write_text, written_whole
from lab.processes import in_child


def partial(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".deepclean-partial")]


def diagonal() -> deepclean.FisherDiagonal:
    torch.manual_seed(0)
    samples = torch.utils.data.TensorDataset(torch.randn(6, 3), torch.arange(6) % 2)
    return deepclean.fisher_diagonal(nn.Linear(3, 2), samples, progress=False)


def save_run(path: Path) -> None:
    sealed.write({"format": "any"}, path)


def save_diagonal(path: Path) -> None:
    diagonal().save(path)


def save_text(path: Path) -> None:
    write_text(path, "a report")


WRITERS: dict[str, Any] = {"run": save_run, "diagonal": save_diagonal, "text": save_text}


@pytest.fixture
def umask() -> Any:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("name", WRITERS)
def test_mode_follows_the_umask(name: str, tmp_path: Path, umask: None) -> None:
    """Fails if a stored file is 0600, which a group that shares a folder cannot read."""
    path = tmp_path / "stored"
    WRITERS[name](path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)  # what its owner chose
    WRITERS[name](path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_link_stays_and_leads_to_the_new_content(name: str, there: bool, tmp_path: Path) -> None:
    """Fails if a link is replaced by a file, so that what it led to keeps the old content."""
    (tmp_path / "disk").mkdir()
    goal, link = tmp_path / "disk" / "goal", tmp_path / "link"
    if there:
        goal.write_text("old")
    link.symlink_to(goal)
    WRITERS[name](link)
    assert link.is_symlink()
    assert goal.stat().st_size > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


class Full(OSError):
    """The disk is full."""


def test_error_leaves_what_stood_there(tmp_path: Path) -> None:
    """Fails if a write that fails half-way harms the good file, or leaves its half."""
    path = tmp_path / "report.json"
    write_text(path, "good")
    with pytest.raises(Full), written_whole(path) as temporary:
        Path(temporary).write_text("ba")
        raise Full
    assert path.read_text() == "good"
    assert partial(tmp_path) == []


def test_leftovers_of_a_kill_go_at_the_next_write(tmp_path: Path) -> None:
    """Fails if killed writers fill the folder, harm the good file, or a writer that is alive loses
    its temporary file."""
    path = tmp_path / "report.json"
    write_text(path, "good")
    code = (
        "import os, signal; from pathlib import Path\n"
        "from deepclean_hooks.stored.files import written_whole\n"
        f"with written_whole(Path({str(path)!r})) as temporary:\n"
        "    Path(temporary).write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert in_child("-c", code, folder=tmp_path).returncode == -signal.SIGKILL
    assert path.read_text() == "good"
    assert len(partial(tmp_path)) == 1
    (tmp_path / ".other.json.0.deepclean-partial").touch()
    with written_whole(path) as alive:
        Path(alive).write_text("first")
        write_text(path, "second")  # another thread or process, meanwhile
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert partial(tmp_path) == [".other.json.0.deepclean-partial"]  # of another file
