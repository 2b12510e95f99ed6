"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed process left there stays
    fcntl = None  # type: ignore[assignment]  # the module, where there is one

_SUFFIX = ".deepclean-partial"


@contextmanager
def written_whole(path: Path) -> Iterator[str]:
    """Yields the name of a temporary file beside `path`, which takes its place at the end.

    After an error in the block, or a kill, what stood at `path` still stands. The file is that of
    a plain `open(path, "w")`: its mode follows the umask, or is the mode of the file it replaces,
    and a symbolic link stays and leads to the new content. Temporary files are called
    `.NAME.*.deepclean-partial`; those of killed processes are removed at the next write of NAME.
    """
    target = Path(os.path.realpath(path))
    _remove_abandoned(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")
    with _reserved(temporary):
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        try:
            yield str(temporary)
            os.chmod(temporary, mode)  # some writers, safetensors for one, make the file anew
            _flush(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if os.name == "posix":
        _flush(target.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) whole or not at all."""
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def require_folder_of(path: Path) -> None:
    """Raises ValueError, before there is anything to write, if the file's folder is missing."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.absolute().parent}")


@contextmanager
def _reserved(temporary: Path) -> Iterator[None]:
    """Makes the file and holds a lock on it, by which other processes see that it is in use."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if fcntl is None:  # an open file cannot be replaced there
            os.close(descriptor)
        else:
            # Some network file systems have no locks.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl is not None:
            os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    if fcntl is None:
        return
    prefix = f".{target.name}."
    for entry in target.parent.iterdir() if target.parent.is_dir() else ():
        if not (entry.name.startswith(prefix) and entry.name.endswith(_SUFFIX)):
            continue
        # OSError: locked by a living process, gone meanwhile, somebody else's, or no locks here.
        with contextlib.suppress(OSError):
            descriptor = os.open(entry, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()
            finally:
                os.close(descriptor)


def _flush(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
