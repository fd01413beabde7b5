"""Name temporary files after the process that writes them, so that the ones a kill left can be found and removed."""

import hashlib
import os
import re
import time
from functools import cache
from glob import escape
from pathlib import Path

SECONDS_OF_OTHERS = 86_400.0  # after which a file of another machine, whose processes cannot be seen, is a leftover

_NAME = re.compile(r"\..+\.(\d+)(?:-([0-9a-f]{8}))?\.tmp")


def name_temporary(path: Path) -> Path:
    """Return the name under which this process writes what becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{identify_machine()}.tmp")


def is_temporary(path: Path) -> bool:
    """Tell whether a file is one that a process is writing, or was when it was killed."""
    return _NAME.fullmatch(path.name) is not None


def sweep_temporaries(path: Path) -> None:
    """Remove what killed processes left of writing `path`, and nothing that a live one is writing."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        if _is_leftover(leftover):
            leftover.unlink(missing_ok=True)


def _is_leftover(path: Path) -> bool:
    found = _NAME.fullmatch(path.name)
    if found is None:
        return False
    if found[2] == identify_machine():
        return not _is_alive(int(found[1]))
    try:
        return time.time() - path.stat().st_mtime > SECONDS_OF_OTHERS
    except FileNotFoundError:
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def read_start_of_process(process: int) -> int | None:
    """Return when a process began, in the system's ticks; None if there is none, or if the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])  # a dead one that nobody has waited for
    except (OSError, IndexError, ValueError):
        return None


@cache
def identify_machine() -> str:
    """Return a digest of where process numbers are unique: this host, and this container on it."""
    namespace = Path("/proc/self/ns/pid")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{os.uname().nodename} {inode}".encode()).hexdigest()[:8]
