"""Write files whole or not at all, and tell whether a file still is what was written.

A file is filled under a temporary name beside its own, waits until the disk has it, and is then renamed into place. A
remote one is filled in a temporary file of this machine, and sent whole.
"""

import contextlib
import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuselm.system.remote_paths import RemoteError, RemotePath
from fuselm.system.temporaries import name_temporary, sweep_temporaries

_exclusive_places: set[tuple[str, ...]] = set()  # buckets that were seen to refuse a second file of the same name


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_file(path: Path, write: Callable[[Path], Any], *, seal: bool = False) -> None:
    """Let `write` fill a file beside `path`; then fsync it and rename it into place.

    With `seal`, its checksum is written to a hidden file beside it, which `is_whole` reads until the stage is done. The
    file is read for it unless `write` returns it. Raises `OSError`, which names `path`.
    """
    if isinstance(path, RemotePath):
        with make_scratch_file(path.name) as scratch:
            checksum = write(scratch)
            if seal:
                write_text(_locate_seal(path), checksum if isinstance(checksum, str) else hash_file(scratch))
            path.send(scratch)
        return
    temporary = name_temporary(path)
    try:
        sweep_temporaries(path)
        checksum = write(temporary)
        fsync(temporary)
        if seal:
            write_text(_locate_seal(path), checksum if isinstance(checksum, str) else hash_file(temporary))
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def make_scratch_file(name: str) -> Iterator[Path]:
    """Yield the path of a file of this machine, not made yet, that is removed with its folder after the block."""
    with tempfile.TemporaryDirectory(prefix="fuselm-") as folder:
        yield Path(folder) / name


@contextlib.contextmanager
def hold_locally(path: Path) -> Iterator[Path]:
    """Yield a path of this machine with what `path` holds: itself, or a copy that is removed after the block."""
    if not isinstance(path, RemotePath):
        yield path
        return
    from fuselm.system import local_copies

    if (copy := local_copies.find_copy(path)) is not None:
        yield copy
        return
    with make_scratch_file(path.name) as scratch:
        path.fetch(scratch)
        yield scratch


def create_exclusively(path: Path, data: bytes) -> bool:
    """Write a file, whole, unless there is one; return whether this call wrote it. Of several at once, one does.

    Remote ones are written under a condition that the service checks, such as `If-None-Match` of S3. False may be
    returned although this call wrote the file, if the answer was lost on its way. Nothing waits for the disk.

    Raises `OSError`, which names `path`; also where the file system or the service cannot do that.
    """
    if isinstance(path, RemotePath):
        return _create_remotely(path, data)
    temporary = name_temporary(path.with_name(f"{path.name}.{threading.get_ident()}"))
    try:
        temporary.write_bytes(data)
        os.link(temporary, path)  # fails if there is one, on network file systems too
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        return _create_without_link(path, data)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_without_link(path: Path, data: bytes) -> bool:
    """Create a file where there are no links. It is empty for a moment."""
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def _create_remotely(path: RemotePath, data: bytes) -> bool:
    is_created = path.create(data)
    place = path.parts[:2]
    if is_created and place not in _exclusive_places and path.create(data):
        raise RemoteError(
            f"{path}: the service there ignores If-None-Match, so processes cannot share work; take another service, "
            "or a folder that all machines see"
        )
    _exclusive_places.add(place)
    return is_created


def is_whole(path: Path) -> bool:
    """Tell whether a sealed file still is what was written."""
    seal = _locate_seal(path)
    return seal.is_file() and seal.read_bytes() == hash_file(path).encode()


def _locate_seal(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.sha256")


def recall_hash(path: Path) -> str:
    """Return the SHA-256 of a file: the one of its seal, if it has one, or else of its contents."""
    seal = _locate_seal(path)
    try:
        return seal.read_text(encoding="utf-8")
    except FileNotFoundError:
        return hash_file(path)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hex digits."""
    with hold_locally(path) as here, open(here, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share_modes(folder: Path) -> None:
    """Let whoever may read a folder read the files in it; libraries write some of them for their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | (folder.stat().st_mode & 0o444))


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk; a remote one is there once written."""
    if isinstance(path, RemotePath):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
