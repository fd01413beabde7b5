"""Work in one thread behind the caller's: the disk is written while the model reads on."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Background:
    """Calls `work` on what is put, in order; at most `ahead` items wait.

    What it raises, the next `put` or the end raises, and nothing is worked on any more.
    """

    def __init__(self, work: Callable[[Any], None], *, ahead: int = 2):
        self._work = work
        self._waiting: queue.Queue = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waiting.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def put(self, item: Any) -> None:
        self._raise()
        self._waiting.put(item)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # so that nobody waits for room
            try:
                self._work(item)
            except BaseException as error:
                self._error = error
