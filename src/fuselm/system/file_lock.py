"""Hold a lock on a file in one process at a time. The lock goes when the process ends, even if it is killed."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fuselm.system.remote_paths import RemotePath


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Wait for a lock file, hold it within the `with` block, and remove it. Remote file systems have no locks."""
    if isinstance(path, RemotePath):
        yield
        return
    with _lock_newest(path):
        yield
        path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Tell whether a live process holds a lock file."""
    if isinstance(path, RemotePath):
        return False
    try:
        with open(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or nobody may write there
        return False
    return False


def remove_stale_lock(path: Path) -> None:
    """Remove a lock file that a killed process left, if nobody holds it and we may."""
    try:
        with open(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except OSError:  # there is none, a live process holds it, or nobody may write there
        return


@contextlib.contextmanager
def _lock_newest(path: Path) -> Iterator[IO[str]]:
    """Open and lock the file that has this name now: whoever held it may have removed the one that we waited for."""
    while True:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if has_name(file, path):
                yield file
                return


def has_name(file: IO[str], path: Path) -> bool:
    """Tell whether a path names the open file, and not another one or none."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
