"""Remember which stores are known to be sound, by the hash of what was checked.

The hash covers the contents of the manifest, and the size, time and inode of each file that the manifest names, as in
fingerprints.py. A store with a changed file is checked again.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuselm.system import fingerprints, manifest
from fuselm.system.remote_paths import RemotePath

VERSION = 2  # of the rules; raise it when a rule is added


def recall_largest_id(folder: Path, made: Mapping[str, Any]) -> int | None:
    """Return the largest token or id of a store that was found sound; None if it was not checked."""
    found = fingerprints.recall(_make_key(folder, made))
    return found if type(found) is int else None


def remember_store(folder: Path, made: Mapping[str, Any], largest: int) -> None:
    """Remember that a store is sound, and its largest token or id."""
    fingerprints.remember(_make_key(folder, made), largest)


def remember_output(folder: Path) -> None:
    """Remember that the output of this run is sound, if it is a store: its ids were checked when they were written."""
    made = manifest.read(folder)
    size = made["counts"].get("vocabulary_size", made["parameters"].get("vocabulary_size"))
    if made["stage"] in ("capture", "align", "fuse") and isinstance(size, int):
        remember_store(folder, made, size - 1)


def _make_key(folder: Path, made: Mapping[str, Any]) -> str:
    lines = [hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()]
    known = folder.list_stats() if isinstance(folder, RemotePath) else {}
    for name in sorted(made["files"]):
        try:
            stat = known[name] if name in known else (folder / name).stat()
            lines.append(f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}")
        except OSError:
            lines.append(f"{name} is missing")
    return f"store {VERSION} {folder.resolve()} {fingerprints.hash_lines(lines)}"
