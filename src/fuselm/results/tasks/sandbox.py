"""Run a function in a process of its own that cannot reach the network or write files, for code that a model wrote.

The process gets a network without devices and sees no other process (`unshare`), may read only what Python itself needs
and write only into an empty folder (Landlock), and has limits on time, memory, processes and the size of files. Only
Linux can do this; where the kernel refuses a part of it, nothing is run.
"""

import contextlib
import ctypes
import functools
import io
import os
import pickle
import resource
import select
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 10.0
MEMORY = 1 << 30  # bytes beyond what this process has
FILE_BYTES, FILES, PROCESSES = 1 << 20, 64, 16
NEW_USERS, NEW_NETWORK, NEW_PROCESSES = 0x10000000, 0x40000000, 0x20000000
DIE_WITH_PARENT = 1  # of prctl
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on all processors but Alpha
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read files, read folders
EVERYTHING = (1 << 13) - 1  # of files, in the first version of Landlock
NO_NEW_PRIVILEGES = 38
LONGEST = 1 << 24  # bytes of a result


class _Ruleset(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


@functools.cache
def check_sandbox() -> None:
    """Raise `ValueError` if this machine cannot run code safely."""
    if sys.platform != "linux":
        raise ValueError("evaluate.run_code: needs Linux, for code is run without network and files; leave it out here")
    try:
        run_sandboxed(_try_to_escape, ["/etc/passwd", str(Path.home())])
    except SandboxError as error:
        raise ValueError(
            f"evaluate.run_code: this machine cannot run code safely ({error}); it needs user namespaces and Landlock"
        ) from None


class SandboxError(Exception):
    """Say that a function in the sandbox did not end well: it took too long, or failed."""


def run_sandboxed(function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> Any:
    """Return what a function returns that is run in the sandbox, in a copy of this process.

    The result must be plain data: it is pickled there and read here without trusting any name in it. Raises
    `SandboxError` if the function raises, takes longer or more memory, or returns something else.
    """
    folder = tempfile.mkdtemp(prefix="fuselm-sandbox-")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _live_in_sandbox(function, arguments, writing, folder, seconds)
    os.close(writing)
    try:
        data = _read_all(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)
    if data is None:
        raise SandboxError(f"it took longer than {seconds:g} seconds")
    if not data:
        raise SandboxError("it was stopped, or took too much memory")
    succeeded, value = _PlainUnpickler(data).load_plain()
    if not succeeded:
        raise SandboxError(str(value))
    return value


@contextlib.contextmanager
def score_in_sandbox(task: Any) -> Iterator[None]:
    """Have a task of lm-eval judge each answer in the sandbox within the `with` block; what fails there is wrong."""
    judge = task.process_results

    def judge_apart(doc: Any, results: Any) -> Any:
        try:
            return run_sandboxed(lambda: {k: float(v) for k, v in judge(doc, results).items()})
        except SandboxError:
            return {metric: 0.0 for metric in task.aggregation()}

    task.process_results = judge_apart
    try:
        yield
    finally:
        del task.process_results


def _live_in_sandbox(function: Callable, arguments: tuple, writing: int, folder: str, seconds: float) -> None:
    """Do the work of the child process, and end it."""
    memory = _measure_memory() + MEMORY
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(NEW_USERS | NEW_NETWORK | NEW_PROCESSES):
            raise SandboxError(f"no namespaces: {os.strerror(ctypes.get_errno())}")
        if child := os.fork():  # the first process of the new namespace: with it, all of it ends
            os.close(writing)
            os.waitpid(child, 0)
            os._exit(0)
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        _restrict_files(libc, folder)
        _set_limits(memory, seconds)
        answer = (True, function(*arguments))
    except BaseException as error:  # whatever the code of a model raises, SystemExit too
        answer = (False, f"{type(error).__name__}: {error}"[:500])
    try:
        data = pickle.dumps(answer)
        with open(writing, "wb") as pipe:
            pipe.write(data)
    finally:
        os._exit(0)


def _set_limits(memory: int, seconds: float) -> None:
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: memory,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _measure_memory() -> int:
    """Return the bytes of addresses that this process has, which a copy of it has from the start."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _restrict_files(libc: ctypes.CDLL, folder: str) -> None:
    """Let this process read Python and its libraries and write into `folder`, and touch no other file."""
    ruleset = _Ruleset(EVERYTHING)
    number = libc.syscall(CREATE_RULESET, ctypes.byref(ruleset), ctypes.sizeof(ruleset), 0)
    if number < 0:
        raise SandboxError(f"no Landlock: {os.strerror(ctypes.get_errno())}")
    readable = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), "/usr", "/lib", "/lib64"}
    readable |= {"/etc/ld.so.cache", "/dev/null", "/dev/urandom"}
    for path, access in [*((p, READ) for p in sorted(readable)), (folder, EVERYTHING), ("/dev/null", 1 << 1 | 1 << 2)]:
        with contextlib.suppress(FileNotFoundError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            access = access if os.path.isdir(path) else access & (1 << 0 | 1 << 1 | 1 << 2)
            rule = _PathRule(access, place)
            failed = libc.syscall(ADD_RULE, number, 1, ctypes.byref(rule), 0)
            os.close(place)
            if failed:
                raise SandboxError(f"Landlock refuses {path}: {os.strerror(ctypes.get_errno())}")
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(RESTRICT_SELF, number, 0):
        raise SandboxError(f"Landlock is refused: {os.strerror(ctypes.get_errno())}")
    os.close(number)


def _read_all(reading: int, deadline: float) -> bytes | None:
    """Return what comes until the other end is closed; None if that takes too long, nothing if it is too much."""
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(reading, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
        if sum(map(len, parts)) > LONGEST:
            return b""


class _PlainUnpickler(pickle.Unpickler):
    """Read plain data: numbers, texts, lists and mappings. The code in the sandbox may have written anything."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")

    def load_plain(self) -> tuple[bool, Any]:
        try:
            succeeded, value = self.load()
            return bool(succeeded), value
        except Exception as error:  # damaged on purpose
            return False, f"its result cannot be read ({type(error).__name__})"


def _try_to_escape(paths: list[str]) -> bool:
    """Raise if a file or the network outside of the sandbox can be reached."""
    for path in paths:
        with contextlib.suppress(PermissionError, FileNotFoundError):
            os.open(path, os.O_RDONLY)
            raise SandboxError(f"{path} can be read")
    if devices := [name for _, name in socket.if_nameindex() if name != "lo"]:
        raise SandboxError(f"there is a network: {devices[0]}")
    return True
