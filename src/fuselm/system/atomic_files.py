"""Write files whole or not at all, and tell whether a file still is what was written.

A file is filled under a temporary name beside its own, waits until the disk has it, and is then renamed into place.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuselm.system.temporaries import name_temporary, sweep_temporaries


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_file(path: Path, write: Callable[[Path], Any], *, seal: bool = False) -> None:
    """Let `write` fill a file beside `path`; then fsync it and rename it into place.

    With `seal`, its checksum is written to a hidden file beside it, which `is_whole` reads until the stage is done.
    Raises `OSError`, which names `path`.
    """
    temporary = name_temporary(path)
    try:
        sweep_temporaries(path)
        write(temporary)
        fsync(temporary)
        if seal:
            write_text(_locate_seal(path), hash_file(temporary))
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Tell whether a sealed file still is what was written."""
    seal = _locate_seal(path)
    return seal.is_file() and seal.read_bytes() == hash_file(path).encode()


def _locate_seal(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.sha256")


def recall_hash(path: Path) -> str:
    """Return the SHA-256 of a file: the one of its seal, if it has one, or else of its contents."""
    seal = _locate_seal(path)
    return seal.read_text(encoding="utf-8") if seal.is_file() else hash_file(path)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share_modes(folder: Path) -> None:
    """Let whoever may read a folder read the files in it; libraries write some of them for their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | (folder.stat().st_mode & 0o444))


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
