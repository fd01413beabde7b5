"""Work in a thread of its own, so that the disk is read and written while something is computed."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")


class Background:
    """Call `work` on each item that is put, in order, in one thread; at most `ahead` items wait.

    The next `put`, or the end of the `with` block, raises what `work` raised; `drop` is called on later items, the one
    of that `put` among them.
    """

    def __init__(self, work: Callable[[Any], None], *, ahead: int = 2, drop: Callable[[Any], None] = lambda item: None):
        self._work, self._drop = work, drop
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
        """Hand over an item; wait while `ahead` items are waiting. Raises what `work` raised of an earlier one."""
        try:
            self._raise()
            self._waiting.put(item)
        except BaseException:
            self._drop(item)
            raise

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                if self._error is None:
                    self._work(item)
                else:  # go on, so that nobody waits for room
                    self._drop(item)
            except BaseException as error:
                self._error = self._error or error


def read_ahead(items: Iterator[Item], ahead: int = 2) -> Iterator[Item]:
    """Yield the items of an iterator that a thread advances, at most `ahead` items before they are wanted."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item
