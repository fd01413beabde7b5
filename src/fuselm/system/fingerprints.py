"""Hash files, and remember the hashes from one process to the next, so that a finished run has nothing to do."""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fuselm.system import atomic_files


def find_cache_folder() -> Path:
    """Return the folder of files that can be made again. Raises `ValueError` if there can be none."""
    try:
        return Path(os.environ.get("FUSELM_CACHE") or "~/.cache/fuselm").expanduser()
    except RuntimeError:  # a user without a home, as in a container
        if (own := find_own_temporary_folder()) is not None:
            return own
    raise ValueError("FUSELM_CACHE: not set, and this user has no home folder; set it to a folder that can be written")


def find_own_temporary_folder() -> Path | None:
    """Return a temporary folder that nobody else can write in; None if another user's is in its place.

    Its contents are trusted, although anybody may write in the folder above it.
    """
    folder = Path(tempfile.gettempdir()) / f"fuselm-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    safe = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if safe else None


def hash_lines(lines: Iterable[str]) -> str:
    """Return 16 hex digits of the SHA-256 of some lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def hash_file_once(path: Path) -> str:
    """Return the SHA-256 of a file; compute it once while the file keeps its path, size, time and inode."""
    found = path.stat()
    key = f"sha256 {path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ino}"
    if found.st_size <= 1 << 20:
        return atomic_files.hash_file(path)
    from fuselm.system import progress

    with progress.announce(f"hashing the weights {path.parent.name}/{path.name}, once, to know them again"):
        return recall_or_compute(key, lambda: atomic_files.hash_file(path))


def recall_or_compute(key: str, compute: Callable[[], Any]) -> Any:
    """Return `compute()`, or what it returned last time. A store that is missing, damaged or read-only costs time."""
    if (value := recall(key)) is not None:
        return value
    value = compute()
    remember(key, value)
    return value


def recall(key: str) -> Any:
    """Return what is remembered under `key`; None if there is nothing."""
    return _read_memory().get(key)


def remember(key: str, value: Any) -> None:
    """Remember a value, which JSON can hold, under `key`; do nothing if the store cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        store = _locate_memory()
        store.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(store, json.dumps({**_read_memory(), key: value}, indent=0))


def _locate_memory() -> Path:
    return find_cache_folder() / "fingerprints.json"


def _read_memory() -> dict[str, Any]:
    try:
        known = json.loads(_locate_memory().read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
