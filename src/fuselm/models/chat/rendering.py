"""Ask a process of its own to render a chat template, and end it if a template takes too long."""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

MOST_SECONDS = 20.0  # for one request; a conversation takes less than a millisecond
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {0} import main; main()"
_WORKER = "fuselm.models.chat.template_worker"


class TemplateRefusal(ValueError):
    """Report that a template cannot render a conversation, or refuses it; the message is the template's own."""


class TemplateFailure(ValueError):
    """Report that a template takes too long or too much memory."""


class _Worker:
    """Hold the process that renders, which is started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._unread = b""

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the answer to a request. Raises `TemplateFailure` if there is none in time."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            process = self._process if self._process is not None and self._process.poll() is None else self._start()
            try:
                answer = self._exchange(process, line, seconds)
            except BaseException:
                self._stop()
                raise
            if answer is None:
                self._stop()
                raise TemplateFailure("its process ended; it may have taken too much memory")
            return answer

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Leave the process to the parent of a process that was forked."""
        _ABANDONED.append(self._process)
        self.__init__()  # type: ignore[misc]

    def _start(self) -> subprocess.Popen:
        self._stop()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START.format(_WORKER), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        for stream in (self._process.stdin, self._process.stdout):
            os.set_blocking(stream.fileno(), False)
        self._unread = b""
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()
            self._process = None

    def _exchange(self, process: subprocess.Popen, line: bytes, seconds: float) -> dict[str, Any] | None:
        """Write a line and read one; None if the process ends."""
        deadline = time.monotonic() + seconds
        wanted, rest, received = process.stdout.fileno(), memoryview(line), [self._unread]
        while True:
            readable, writable, _ = select.select(
                [wanted], [process.stdin.fileno()] if rest else [], [], max(deadline - time.monotonic(), 0)
            )
            if not readable and not writable:
                raise TemplateFailure(f"took longer than {seconds:g} seconds")
            if writable:
                try:
                    rest = rest[os.write(process.stdin.fileno(), rest[: 1 << 16]) :]
                except BrokenPipeError:
                    return None
            if readable:
                if not (block := os.read(wanted, 1 << 20)):
                    return None
                received.append(block)
                if b"\n" in block:
                    whole, _, self._unread = b"".join(received).partition(b"\n")
                    return json.loads(whole)


_ABANDONED: list[subprocess.Popen | None] = []  # a parent's processes, which are not ours to end
_WORKER_PROCESS = _Worker()
atexit.register(_WORKER_PROCESS.close)
os.register_at_fork(after_in_child=_WORKER_PROCESS.forget)


def render(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    names: Mapping[str, Any],
    *,
    marks: tuple[str, str] | None = None,
    seconds: float = MOST_SECONDS,
) -> list[str | TemplateRefusal]:
    """Return each conversation as the template writes it, or what it says if it refuses.

    `names` are what the template may use besides `messages`. `marks` are put around what the template says that the
    assistant generates. A template sees the same date every day. Raises `TemplateFailure`, a `ValueError`, if the
    template takes too long or too much memory, and `TemplateRefusal` if it is no template.
    """
    request = {"template": template, "conversations": conversations, "names": names, "marks": marks or []}
    answer = _WORKER_PROCESS.ask(request, seconds)
    if "error" in answer:
        raise TemplateRefusal(answer["error"])
    return [text if text is not None else TemplateRefusal(error) for text, error in answer["texts"]]
