"""A process that is killed at one of its writes, and what it left."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "open")


class Writes:
    """Counts what the process does to files of a folder, and kills it at one of these."""

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at, self.seen = str(folder), at, 0
        sys.addaudithook(self)

    def __call__(self, event: str, args: Any) -> None:
        if event not in WRITES or self.folder not in str(args[0]):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], None], folder: Path) -> int:
    """Runs in a child, which shares no state afterwards; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
