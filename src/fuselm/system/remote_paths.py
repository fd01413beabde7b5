"""Let object stores and other remote file systems be named wherever a folder or a file can be: `s3://bucket/run`.

`open_path` turns what a user wrote into a path. A `RemotePath` is a `pathlib.Path` whose methods reach its file system
through fsspec, so most code need not know where a file is. Code that gives a path to `open`, `os` or `shutil` does need
to know, and gets a `TypeError` from a remote one, never a local file of that name.

Object stores have no folders, no rename and no locks: a folder is there while something is in it, and files appear
under their final name, whole. Credentials come from the environment, as each file system documents it, never from here.
"""

import contextlib
import errno
import fnmatch
import hashlib
import io
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PosixPath
from typing import Any

from fuselm.system.errors import summarize_error

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_ROOT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_WITH_PASSWORD = re.compile(r"[^/]*:[^/]*@")
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")  # by the file system
# The extra of fuselm that a file system needs, and where a file can be created only if there is none.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
REQUESTS = 16  # in flight at a time
EXCLUSIVE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")


class RemoteError(OSError, ValueError):
    """Report that a remote file system refuses or cannot be reached; the message names the path."""


def open_path(text: str | os.PathLike) -> Path:
    """Return the path that a user wrote: a folder or file of this machine, or a remote one such as `s3://bucket/run`.

    Nothing is read. Raises `ValueError` if the file system is unknown or needs a package that is not installed, or if
    the address holds a password.
    """
    if isinstance(text, RemotePath):
        return text
    found = _ADDRESS.fullmatch(os.fspath(text))
    if found is None:
        return Path(text).expanduser()
    if found[1].lower() in ("file", "local"):
        return Path(found[2])
    if _WITH_PASSWORD.match(found[2]):
        raise ValueError(
            f"{found[1]}://…@…: holds a password, which files of the run would show; give it by the environment"
        )
    path = RemotePath(f"{found[1].lower()}://{posixpath.normpath(found[2]) if found[2] else ''}")
    _find_filesystem_class(path.protocol, str(path))
    return path


def is_remote(path: str | os.PathLike) -> bool:
    """Tell whether a path, or what a user wrote as one, is not of this machine's file system."""
    if isinstance(path, Path):
        return isinstance(path, RemotePath)
    found = _ADDRESS.fullmatch(os.fspath(path))
    return found is not None and found[1].lower() not in ("file", "local")


class RemotePath(PosixPath):
    """Name a file or folder of a remote file system. Methods that only deal with names are those of pathlib."""

    @property
    def protocol(self) -> str:
        """Return the name of the file system, such as `s3`; empty if this is relative to another path."""
        first = self.parts[0] if self.parts else ""
        return first[:-1] if _ROOT.fullmatch(first) else ""

    @property
    def filesystem(self) -> Any:
        """Return the fsspec file system. It keeps no listings, because other processes write there, too."""
        options = {} if self.protocol in ("http", "https") else {"use_listings_cache": False}
        with _name_errors(self):
            return _find_filesystem_class(self.protocol, str(self))(**options)

    @property
    def key(self) -> str:
        """Return the path as the file system's own methods take it."""
        return self.filesystem._strip_protocol(str(self))

    def __str__(self) -> str:
        if not self.protocol:
            return super().__str__()
        return f"{self.parts[0]}//{'/'.join(self.parts[1:])}"

    def __fspath__(self) -> str:
        raise TypeError(f"{self}: is remote; the system cannot open it by its name")

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __truediv__(self, name: Any) -> Path:  # type: ignore[override]
        return self.joinpath(name)

    def joinpath(self, *names: Any) -> Path:
        """Return the path of `names` in this folder; the last of them that is absolute begins anew."""
        path: Path = self
        for name in names:
            if isinstance(name, RemotePath) and not name.protocol:
                name = str(name)
            begins_anew = is_remote(name) or os.path.isabs(name)
            path = open_path(name) if begins_anew else PosixPath.__truediv__(path, name)
        return path

    def is_absolute(self) -> bool:
        """Tell whether this says itself where it is."""
        return bool(self.protocol)

    def absolute(self) -> "RemotePath":
        """Return the path itself, because no folder of this machine is meant."""
        return self

    def resolve(self, strict: bool = False) -> "RemotePath":
        """Return the path itself, because there are no links."""
        return self

    def expanduser(self) -> "RemotePath":
        """Return the path itself, because there is no home folder."""
        return self

    @property
    def parent(self) -> Path:
        """Return the folder of this path; a bucket is its own, as the root of a disk is."""
        return self if len(self.parts) == 2 and self.protocol else super().parent

    def as_uri(self) -> str:
        """Return the address."""
        return str(self)

    # ---- what is there

    def info(self) -> dict[str, Any]:  # type: ignore[override]
        """Return what the file system says of a file or folder. Raises `FileNotFoundError`."""
        with _name_errors(self):
            return self.filesystem.info(self.key)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return size and time; the inode is another number wherever the file system says that the file is another."""
        return _make_stat(self.info())

    def list_stats(self) -> dict[str, os.stat_result]:
        """Return what `stat` does of every file below this path, by its path in there, in one request or a few."""
        with _name_errors(self):
            found = self.filesystem.find(self.key, detail=True)
        base = self.key.rstrip("/") + "/"
        return {name[len(base) :]: _make_stat(found[name]) for name in sorted(found) if name.startswith(base)}

    def lstat(self) -> os.stat_result:
        """Return what `stat` does."""
        return self.stat()

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Tell whether there is such a file, or anything in such a folder."""
        with _name_errors(self):
            return self.filesystem.exists(self.key)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Tell whether there is such a file."""
        with _name_errors(self):
            return self.filesystem.isfile(self.key)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Tell whether anything is in such a folder."""
        with _name_errors(self):
            return self.filesystem.isdir(self.key)

    def is_symlink(self) -> bool:
        """Return false."""
        return False

    def samefile(self, other: Any) -> bool:
        """Tell whether another path is the same."""
        return self == other

    def iterdir(self) -> Iterator[Path]:
        """Yield what is in the folder, in the order of names. Raises `FileNotFoundError` if nothing is."""
        with _name_errors(self):
            found = self.filesystem.ls(self.key, detail=False)
        names = {posixpath.basename(path.rstrip("/")) for path in found if path.strip("/") != self.key.strip("/")}
        yield from (self / name for name in sorted(names))

    def glob(self, pattern: str, **_: Any) -> Iterator[Path]:  # type: ignore[override]
        """Yield the paths below this one that match a pattern without `**`, in order."""
        first, _slash, rest = str(pattern).partition("/")
        if not re.search(r"[*?\[]", first):
            found = [self / first] if rest or (self / first).exists() else []
        else:
            found = [path for path in self._list() if fnmatch.fnmatchcase(path.name, first)]
        for path in found:
            yield from path.glob(rest) if rest else [path]

    def rglob(self, pattern: str, **_: Any) -> Iterator[Path]:  # type: ignore[override]
        """Yield the files at any depth below this path whose name matches a pattern, in order."""
        with _name_errors(self):
            found = self.filesystem.find(self.key)
        base = self.key.rstrip("/") + "/"
        for path in sorted(path for path in found if path.startswith(base)):
            if fnmatch.fnmatchcase(posixpath.basename(path), str(pattern)):
                yield self / path[len(base) :]

    def _list(self) -> list[Path]:
        try:
            return list(self.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    # ---- reading and writing

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """Open the file. What is written appears when it is closed."""
        with _name_errors(self):
            file = self.filesystem.open(self.key, mode.replace("b", "").replace("t", "") + "b")
        return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", errors, newline)

    def read_bytes(self) -> bytes:
        """Return what the file holds."""
        with _name_errors(self):
            return self.filesystem.cat_file(self.key)

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """Return the text that the file holds."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding or "utf-8", errors or "strict", newline).read()

    def write_bytes(self, data: Any) -> int:
        """Write the file, whole or not at all."""
        with _name_errors(self, is_written=True):
            self.filesystem.pipe_file(self.key, bytes(data))
        return len(data)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        """Write a text file, whole or not at all."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def create(self, data: bytes) -> bool:
        """Write the file unless there is one; tell whether this call wrote it. See `atomic_files.create_exclusively`.

        Where the answer to a write is lost, this may return false although it was written.
        """
        if self.protocol not in EXCLUSIVE:
            raise RemoteError(f"{self}: processes cannot share work there; use s3://, gs:// or az://")
        try:
            self.filesystem.pipe_file(self.key, data, mode="create")
        except FileExistsError:
            return False
        except Exception:  # each file system has its own way to say that there is a file
            if self.is_file():
                return False
            with _name_errors(self, is_written=True):
                raise
        return True

    def fetch(self, to: Path) -> None:
        """Copy the file to one of this machine."""
        with _name_errors(self):
            self.filesystem.get_file(self.key, str(to))

    def send(self, file: Path) -> None:
        """Write what a file of this machine holds, whole or not at all."""
        with _name_errors(self, is_written=True):
            self.filesystem.put_file(str(file), self.key)

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Write an empty file unless there is one."""
        if not self.exists():
            self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            with _name_errors(self):
                self.filesystem.rm_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_files(self, paths: "list[RemotePath]") -> None:
        """Remove files, several at a time; those that are gone are no error."""
        with ThreadPoolExecutor(REQUESTS) as threads:
            list(threads.map(lambda path: path.unlink(missing_ok=True), paths))

    def remove_tree(self) -> None:
        """Remove everything below this path; do nothing if nothing is there."""
        with contextlib.suppress(FileNotFoundError), _name_errors(self):
            self.filesystem.rm(self.key, recursive=True)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there as soon as a file is in it."""

    def rmdir(self) -> None:
        """Do nothing: a folder is gone as soon as no file is in it."""

    def chmod(self, mode: int, *, follow_symlinks: bool = True) -> None:
        """Do nothing: who may read is said by the file system."""

    def rename(self, target: Any) -> "RemotePath":
        """Raise `RemoteError`, because object stores have no rename."""
        raise RemoteError(f"{self}: cannot be renamed there")

    replace = rename


def _make_stat(found: Mapping[str, Any]) -> os.stat_result:
    """Return what a file system says of a file as the system would."""
    mode = stat.S_IFDIR | 0o755 if found["type"] == "directory" else stat.S_IFREG | 0o644
    version = next((found[k] for k in ("ETag", "etag", "md5Hash", "content_md5", "blob_id") if found.get(k)), "")
    inode = int(hashlib.sha256(f"{found.get('name')} {version}".encode()).hexdigest()[:12], 16)
    seconds = _read_time(next((found[name] for name in _TIMES if found.get(name) is not None), 0))
    times = {f"st_{kind}time_ns": int(seconds * 1e9) for kind in "amc"}
    whole = int(seconds)
    ten = (mode, inode, 0, 1, os.getuid(), os.getgid(), int(found.get("size") or 0), whole, whole, whole)
    return os.stat_result((*ten, *(seconds,) * 3, *times.values()))


def _read_time(value: Any) -> float:
    """Return seconds since 1970 from what a file system gives as a time."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)


def _find_filesystem_class(protocol: str, where: str) -> Any:
    """Return the class of a file system. Raises `ValueError`, which says what to install or to write."""
    import fsspec

    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        what = f"pip install 'fuselm[{EXTRAS[protocol]}]'" if protocol in EXTRAS else summarize_error(error)
        raise ValueError(f"{where}: needs a package that is not installed; {what}") from None
    except ValueError:
        raise ValueError(
            f"{where}: no file system is known as {protocol}://; write a path, or s3://, gs://, az:// or hf://"
        ) from None


@contextlib.contextmanager
def _name_errors(path: RemotePath, *, is_written: bool = False) -> Iterator[None]:
    """Turn what a file system raises into one line that names the path; what says that it is not there stays."""
    try:
        yield
    except FileNotFoundError:
        if is_written:
            raise RemoteError(f"{path}: there is no such bucket or container; create it, or name another") from None
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except (FileExistsError, IsADirectoryError, NotADirectoryError, RemoteError):
        raise
    except PermissionError as error:
        raise RemoteError(f"{path}: access is refused ({summarize_error(error)}); check the credentials") from None
    except MemoryError:
        raise
    except Exception as error:  # each file system has its own
        if type(error) is ValueError and str(error).startswith(str(path)):
            raise
        raise RemoteError(
            f"{path}: cannot be reached ({summarize_error(error)}); check the address, credentials and network, and "
            "run the same command again"
        ) from None
