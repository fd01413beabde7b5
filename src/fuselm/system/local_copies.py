"""Keep copies of remote folders on this machine: of models, which libraries read from a disk, and of stages being made.

A copy of `s3://bucket/run/train/x` is `remote/s3/bucket/run/train/x` in the cache's folder. A file is copied again when
its size or its time differs from the remote one's, so a copy can be deleted at any time.
"""

import errno
import os
from pathlib import Path

from fuselm.system import progress
from fuselm.system.fingerprints import find_cache_folder
from fuselm.system.remote_paths import RemotePath
from fuselm.system.temporaries import is_temporary, name_temporary, sweep_temporaries

FOLDER = "remote"  # in the cache's folder


def locate_copy(path: RemotePath) -> Path:
    """Return where the copy of a remote file or folder is on this machine, whether or not it is there."""
    return find_cache_folder().joinpath(FOLDER, path.protocol, *path.parts[1:])


def fetch_folder(folder: Path) -> Path:
    """Return a folder of this machine with the files of `folder`, which may be remote.

    Files that an interrupted call has copied are not copied again. Raises `FileNotFoundError` if a remote folder is not
    there.
    """
    if not isinstance(folder, RemotePath):
        return folder
    copy, found = locate_copy(folder), list_files(folder)
    if not found:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    missing = [name for name, described in found.items() if _describe(copy / name) != described]
    if missing:
        size = sum(found[name][0] for name in missing) / 1e6
        with progress.announce(f"copying {len(missing)} files, {size:,.1f} MB, from {folder}"):
            for name in missing:
                _fetch(folder / name, copy / name, found[name])
    for path in sorted(copy.rglob("*")):
        if path.is_file() and str(path.relative_to(copy)) not in found and not is_temporary(path):
            path.unlink(missing_ok=True)
    return copy


def fetch_file(path: Path) -> Path:
    """Return a file of this machine with the contents of `path`, which may be remote."""
    if not isinstance(path, RemotePath):
        return path
    copy, described = locate_copy(path), _describe(path)
    if described is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if _describe(copy) != described:
        _fetch(path, copy, described)
    return copy


def find_copy(path: Path) -> Path | None:
    """Return a file of this machine that is known to hold what `path` does, if there is one; copy nothing."""
    if not isinstance(path, RemotePath):
        return path
    copy = locate_copy(path)
    return copy if copy.is_file() and _describe(copy) == _describe(path) else None


def send_folder(copy: Path, folder: RemotePath, *, last: str = "manifest.json") -> None:
    """Write the files of a copy to its remote folder, `last` after all others, and remove others that are there.

    Files that an interrupted call has written are not written again.
    """
    there = list_files(folder)
    names = [str(path.relative_to(copy)) for path in sorted(copy.rglob("*")) if path.is_file() and _is_product(path)]
    names = [*(name for name in names if name != last), *(name for name in names if name == last)]
    for name in there.keys() - set(names):
        if _is_product(folder / name):
            (folder / name).unlink(missing_ok=True)
    changed = [name for name in names if name not in there or _describe(copy / name) != there[name]]
    size = sum((copy / name).stat().st_size for name in changed) / 1e6
    with progress.announce(f"copying {len(changed)} files, {size:,.1f} MB, to {folder}"):
        for name in changed:
            (folder / name).send(copy / name)
            _, seconds = _describe(folder / name) or (0, 0)
            os.utime(copy / name, (seconds, seconds))


def find_disk(folder: Path) -> Path:
    """Return the nearest folder that is there of those where `folder` takes room on this machine."""
    wanted = locate_copy(folder) if isinstance(folder, RemotePath) else folder.absolute()
    return next(path for path in (wanted, *wanted.parents) if path.exists())


def list_files(folder: RemotePath) -> dict[str, tuple[int, int]]:
    """Return the size and time of each file below a remote folder, by its path in there."""
    return {name: (found.st_size, int(found.st_mtime)) for name, found in folder.list_stats().items()}


def _fetch(path: RemotePath, copy: Path, described: tuple[int, int]) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(copy)
    temporary = name_temporary(copy)
    try:
        path.fetch(temporary)
        os.utime(temporary, (described[1], described[1]))
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


def _describe(path: Path) -> tuple[int, int] | None:
    """Return what tells whether a copy is the same; None if there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, int(found.st_mtime)


def _is_product(path: Path) -> bool:
    return not path.name.startswith(".")
