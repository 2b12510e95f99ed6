"""Damaged files: each is refused with a clear error, or what was read is what was written.

    DEEPCLEAN_CORRUPTIONS=300 pytest -m slow tests/test_corruption.py

Damage is drawn from a seed: bits and bytes flipped, blocks zeroed or exchanged, ends cut off, bytes
added, in every file that the package reads.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deepclean_hooks as deepclean
from deepclean_hooks.__main__ import main
from deepclean_hooks.report import stored_report
from deepclean_hooks.stored import bits, checkpoint, sealed
from deepclean_hooks.stored.checkpoint import model_digest
from lab.planted import FORGET, RETAIN, original
from lab.reported import Tied, unlearned

COUNT = int(os.environ.get("DEEPCLEAN_CORRUPTIONS", "150"))

Read = Callable[[Path], bool | None]
"""Whether what was read is what was written; None for a file that was refused as it should be."""


def flipped_bit(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def flipped_bytes(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(2, 40)):
        data[draw.randrange(len(data))] = draw.randrange(256)


def zeroed(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    end = min(len(data), at + draw.choice([8, 64, 512]))
    data[at:end] = bytes(end - at)


def exchanged(data: bytearray, draw: random.Random) -> None:
    size = min(64, len(data) // 2)
    first, second = sorted(draw.randrange(len(data) - size) for _ in range(2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def added(data: bytearray, draw: random.Random) -> None:
    at = draw.choice([0, len(data), draw.randrange(len(data))])
    data[at:at] = draw.randbytes(draw.choice([1, 16]))


def at_the_head(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(min(64, len(data)))] ^= 1 << draw.randrange(8)


DAMAGE = [flipped_bit, flipped_bytes, zeroed, exchanged, cut, added, at_the_head]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every file that is read."""
    where = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = Tied()
    report = unlearned(model)
    (where / "report.json").write_text(report.to_json(), encoding="utf-8")
    torch.save({"model": model.state_dict(), "epoch": 3}, where / "after.pt")
    once = {n: v.contiguous() for n, v in model.state_dict().items() if not n.startswith("first")}
    save_file(once, where / "after.safetensors")
    network = copy.deepcopy(original())
    deepclean.fisher_diagonal(network, RETAIN, progress=False).save(where / "d.safetensors")
    run = deepclean.Session(network, deepclean.DeepClean(gamma=1.2), scores=False, progress=False)
    run.measure(FORGET, RETAIN).select()
    run.reset()
    sealed.write(sealed.seal(run.state_dict(), network), where / "run.pt")
    torch.save(network.state_dict(), where / "network.pt")
    return where


def verified(
    folder: Path, capsys: pytest.CaptureFixture[str], report: Path, after: Path
) -> bool | None:
    """None if verify says no or cannot read; whether it is right to say yes otherwise."""
    code = main(["verify", str(report), str(after)])
    told = capsys.readouterr()
    assert code in (0, 1, 2)
    assert len(told.err.splitlines()) == (code == 2), told.err
    assert ("MISMATCH" in told.out) == (code == 1), told.out
    if code:
        return None
    read, written = (checkpoint.states(checkpoint.read(p)) for p in (after, folder / after.name))
    # Under a damaged name a tensor is told as one "under other names", if its content is right.
    same = [sorted(checkpoint.digests(a).values()) for a in read.values()] == [
        sorted(checkpoint.digests(b).values()) for b in written.values()
    ]
    same &= "under other names" in told.out or read.keys() == written.keys()
    reports = (stored_report.load(path) for path in (report, folder / "report.json"))
    return same and len({json.dumps(r, sort_keys=True) for r in reports}) == 1


def diagonal(folder: Path, path: Path) -> bool | None:
    try:
        read = deepclean.FisherDiagonal.load(path)
    except ValueError as reason:
        return None if str(path) in str(reason) else False
    written = deepclean.FisherDiagonal.load(folder / "d.safetensors")
    return (
        bits.digest(read.sums) == bits.digest(written.sums)
        and read.count == written.count
        and torch.equal(read.samples, written.samples)
        and read.settings == written.settings
    )


def resumed(folder: Path, path: Path) -> bool | None:
    """A run that is taken up has the masks, the account and the report of the one stored."""
    network = nn.Sequential(*copy.deepcopy(original()))
    network.load_state_dict(torch.load(folder / "network.pt", weights_only=True))
    reports, frees = [], []
    for each in (path, folder / "run.pt"):
        run = deepclean.Session(
            network, deepclean.DeepClean(gamma=1.2), scores=False, progress=False
        )
        try:
            stored = sealed.read(each)
            state = sealed.opened(stored, str(each))
            if stored["model"] != model_digest(network):
                raise sealed.BrokenRun(f"{each} is of other weights")
            run.load_state_dict(state)
        except sealed.BrokenRun as reason:
            return None if each == path and str(each) in str(reason) else False
        reports.append(run.report.to_json())
        frees.append(bits.digest(state["free"]))
    return len(set(reports)) == len(set(frees)) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # zip files and pickles warn of what then is an error
def test_no_damage_is_believed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a damaged file is read as another result, ends in an exception that names nothing,
    or a file that is whole is refused."""
    report, after = folder / "report.json", folder / "after.pt"
    readers: dict[str, Read] = {
        "report.json": lambda path: verified(folder, capsys, path, after),
        "after.pt": lambda path: verified(folder, capsys, report, path),
        "after.safetensors": lambda path: verified(folder, capsys, report, path),
        "d.safetensors": lambda path: diagonal(folder, path),
        "run.pt": lambda path: resumed(folder, path),
    }
    for name, read in readers.items():
        assert read(folder / name) is True, f"{name} is refused as it was written"
    refused: dict[str, int] = dict.fromkeys(readers, 0)
    failures: list[Any] = []
    for seed in range(COUNT):
        draw = random.Random(seed)
        name = list(readers)[seed % len(readers)]
        damage = DAMAGE[(seed // len(readers)) % len(DAMAGE)]
        data = bytearray((folder / name).read_bytes())
        damage(data, draw)
        (tmp_path / name).write_bytes(bytes(data))
        try:
            outcome = readers[name](tmp_path / name)
        except Exception as reason:
            failures.append((seed, name, damage.__name__, repr(reason)[:300]))
            continue
        if outcome is None:
            refused[name] += 1
        elif not outcome:
            failures.append((seed, name, damage.__name__, "believed"))
    assert not failures, f"{len(failures)} of {COUNT}: {failures[:5]}"
    assert all(2 * count > COUNT // len(readers) for count in refused.values()), refused
