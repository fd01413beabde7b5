"""Hashes of files, remembered from one process to the next, so that a run that has nothing to do does nothing."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fuselm import manifest


def cache() -> Path:
    """Where fuselm keeps what can be made again."""
    return Path(os.environ.get("FUSELM_CACHE") or "~/.cache/fuselm").expanduser()


def digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Of the file's contents; computed once for a file that keeps its path, size, time and inode."""
    stat = path.stat()
    key = f"sha256 {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    return remembered(key, lambda: manifest.sha256(path)) if stat.st_size > 1 << 20 else manifest.sha256(path)


def remembered(key: str, compute: Callable[[], Any]) -> Any:
    """`compute()`, or what it gave the last time. A missing, damaged or read-only store only costs time."""
    if (value := recall(key)) is not None:
        return value
    value = compute()
    remember(key, value)
    return value


def recall(key: str) -> Any:
    """What was remembered under `key`, or None."""
    return _known().get(key)


def remember(key: str, value: Any) -> None:
    store = _store()
    with contextlib.suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(store, json.dumps({**_known(), key: value}, indent=0))


def _store() -> Path:
    return cache() / "fingerprints.json"


def _known() -> dict[str, Any]:
    try:
        known = json.loads(_store().read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
