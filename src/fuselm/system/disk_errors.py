"""Turn what libraries say about a full or broken disk into the system's own error, with a file or folder in it."""

import contextlib
import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

# Full, a limit on file sizes, a quota; read-only, broken, or gone while it was written.
CODES = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT, errno.EACCES, errno.ESTALE)

# Rust (safetensors) ends with `(os error 28)`, Python and Arrow begin with `[Errno 28]`.
_NUMBERED = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
# torch and numpy do not say why.
_UNEXPLAINED = re.compile(r"unexpected pos \d+|PytorchStreamWriter|file write failed|\d+ requested and \d+ written")
_GONE = re.compile(r"Parent directory .* does not exist")  # torch


@contextlib.contextmanager
def name_disk_errors(folder: Path) -> Iterator[None]:
    """Raise errors of the disk as `OSError` with the system's number, and with `folder` if they name no file."""
    try:
        yield
    except Exception as error:
        number = find_code(error, folder)
        if number is None or (isinstance(error, OSError) and error.errno and error.filename):
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def find_code(error: Exception, folder: Path) -> int | None:
    """Return the system's number for what stopped a library that was writing into `folder`; None if another thing did.

    A `ValueError` is ours, and says itself what is wrong.
    """
    if isinstance(error, ValueError):
        return None
    number = getattr(error, "errno", None)
    if number is None and (found := _NUMBERED.search(str(error))):
        number = int(found[1] or found[2])
    if number is None:
        number = next((code for code in CODES if os.strerror(code) in str(error)), None)
    if number is None and _GONE.search(str(error)):
        number = errno.ENOENT
    if number is None and _UNEXPLAINED.search(str(error)):
        number = errno.EFBIG if _has_file_at_limit(folder) else errno.ENOSPC
    return number if number in CODES else None


def _has_file_at_limit(folder: Path) -> bool:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return False
    return any(path.stat().st_size >= limit for path in folder.rglob("*") if path.is_file())
