"""A lock on a file, held by one process at a time, and gone with it even if it is killed."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Wait for a lock file, hold it, and remove it."""
    with _newest(path):
        yield
        path.unlink(missing_ok=True)


def remove_unheld(path: Path) -> None:
    """Remove a lock file that a killed process left, where this can be done."""
    try:
        with open(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except OSError:  # there is none, a live process holds it, or nobody may write there
        return


@contextlib.contextmanager
def _newest(path: Path) -> Iterator[IO[str]]:
    """Open and lock the file that has the name now: the one waited for may have been removed by who held it."""
    while True:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    yield file
                    return
