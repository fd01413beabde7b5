"""Compile kernels once for a machine, and keep what was compiled wherever a folder can be written.

This replaces numba's own cache, which needs a writable folder at import, trusts whatever its files hold, and does not
notice that a function in another file has changed. A file that is damaged, or that cannot be written, only costs time.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching, event, serialize
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher

from fuselm.system import fingerprints, progress

SUFFIX = ".kernel"
CHECKSUM_BYTES = 32
# Where kernels are, by the stage that first needs them; and the seconds that they took to compile, with all that they
# call, on one core of an AMD EPYC of 2024 with nothing beside it.
STAGES = {
    "capture": ("models.joined_bytes", "models.scan", "system.index_checks"),
    "align": (
        "models.bpe",
        *(
            f"alignment.{module}"
            for module in (
                "spelling",
                "continuation",
                "next_tokens",
                "span",
                "branch_votes",
                "branch_splits",
                "branch_tails",
                "completions",
                "split_groups",
                "follower_draws",
                "key_tables",
                "separation",
                "blind_rows",
                "plain_spelling",
                "mined",
                "maps",
                "nearest",
            )
        ),
        "stores.rounding",
    ),
    "fuse": ("fusion.pooling", "fusion.sorted_sums", "fusion.tails", "fusion.weights"),
    "train": ("training.batches", "training.order"),
    "verify": ("stores.rules",),
}
SECONDS = {"capture": 3.0, "align": 14.0, "fuse": 7.0, "train": 0.5, "verify": 1.0}


def compiled(**options: Any) -> Callable[[Callable], Dispatcher]:
    """Decorate a kernel with `numba.njit(**options)`, and keep on disk what a first call compiles."""

    def decorate(function: Callable) -> Dispatcher:
        dispatcher = numba.njit(**options)(function)
        dispatcher._cache = KernelCache(function, options)
        return dispatcher

    return decorate


class KernelCache(caching.NullCache):
    """Keep what was compiled of one kernel, a file for each signature: a checksum, then a pickle."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        self._function = function
        self._options = options

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """Return what is kept for a signature; None if there is nothing, or it is damaged."""
        with _leave_out_of_rates():
            return self._find(sig, target_context)

    def _find(self, sig: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        key = self._key(sig, target_context.codegen())
        for folder in list_cache_folders():
            try:
                data = (folder / self._name(key)).read_bytes()
                if hashlib.sha256(data[CHECKSUM_BYTES:]).digest() != data[:CHECKSUM_BYTES]:
                    continue
                found, payload = pickle.loads(data[CHECKSUM_BYTES:])
                if found == key:
                    return CompileResult._rebuild(target_context, *payload)
            except Exception:  # an absent or unreadable file, or one that another version wrote
                continue
        return None

    def save_overload(self, sig: Any, cres: CompileResult) -> None:
        """Keep what was compiled in the first folder that takes it."""
        if cres.library.has_dynamic_globals or any(not lifted.can_cache for lifted in cres.lifted):
            return
        with _leave_out_of_rates():
            self._write(sig, cres)

    def _write(self, sig: Any, cres: CompileResult) -> None:
        key = self._key(sig, cres.codegen)
        data = serialize.dumps((key, cres._reduce()))
        for folder in list_cache_folders():
            temporary = folder / f".{self._name(key)}.{os.getpid()}.tmp"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(hashlib.sha256(data).digest() + data)
                os.replace(temporary, folder / self._name(key))
                return
            except OSError:
                _remove_file(temporary)

    @property
    def _stem(self) -> str:
        return f"{self._function.__module__}.{self._function.__qualname__}"

    def _name(self, key: str) -> str:
        return f"{self._stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}{SUFFIX}"

    def _key(self, sig: Any, codegen: Any) -> str:
        """Return all that the machine code depends on."""
        versions = (sys.version_info[:3], numba.__version__, llvmlite.__version__, numba.config.BOUNDSCHECK)
        options = sorted((name, sorted(v) if isinstance(v, set) else v) for name, v in self._options.items())
        return repr((versions, codegen.magic_tuple(), options, hash_source(self._function), sig))


@functools.cache
def hash_source(function: Callable) -> str:
    """Return a hash of a kernel's file, its constants, and likewise of all kernels that it calls."""
    lines = [_hash_of_file(function.__code__.co_filename), function.__qualname__, function.__code__.co_code.hex()]
    for name in sorted(set(function.__code__.co_names)):
        value = function.__globals__.get(name)
        if isinstance(value, Dispatcher):
            if value.py_func is not function:
                lines.append(f"{name} {hash_source(value.py_func)}")
        elif not callable(value) and not hasattr(value, "__file__"):
            lines.append(f"{name} {value!r}")
    return fingerprints.hash_lines(lines)


@functools.cache
def _hash_of_file(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:  # in an archive: the code itself is hashed too
        return ""


def list_cache_folders() -> Iterator[Path]:
    """Yield the folders that compiled kernels are looked for and kept in, the best first."""
    if numba.config.CACHE_DIR:
        yield Path(numba.config.CACHE_DIR)
    yield Path(__file__).parent / "__pycache__"
    with contextlib.suppress(ValueError):
        yield fingerprints.find_cache_folder() / "compiled"
    if (own := fingerprints.find_own_temporary_folder()) is not None:
        yield own


def estimate_seconds(stage: str) -> float:
    """Return about how many seconds a stage's kernels will take to compile; 0 if any is kept already."""
    patterns = [f"fuselm.{module}.*{SUFFIX}" for module in STAGES.get(stage, ())]
    is_kept = any(True for folder in list_cache_folders() for pattern in patterns for _ in folder.glob(pattern))
    return 0.0 if is_kept else SECONDS.get(stage, 0.0)


def _remove_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


class _Listener(event.Listener):
    """Tell the stage on the screen that a kernel is compiled, and count the kernels that it calls as a part of it."""

    def __init__(self) -> None:
        self._depth = 0  # changed under the compiler's lock
        self._began = 0.0

    def on_start(self, event: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._began = time.monotonic()
            module = event.data["dispatcher"].py_func.__module__.removeprefix("fuselm.")
            for stage, modules in STAGES.items():
                if module in modules:
                    progress.note_compilation(stage, estimate_seconds(stage))

    def on_end(self, event: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            progress.leave_out_of_rates(time.monotonic() - self._began)

    @property
    def is_compiling(self) -> bool:
        """Tell whether a kernel is being compiled."""
        return self._depth > 0


@contextlib.contextmanager
def _leave_out_of_rates() -> Iterator[None]:
    """Leave the seconds of reading or writing kept kernels out of rates, unless a compilation counts them."""
    began = time.monotonic()
    try:
        yield
    finally:
        if not _LISTENER.is_compiling:
            progress.leave_out_of_rates(time.monotonic() - began)


_LISTENER = _Listener()
event.register("numba:compile", _LISTENER)
