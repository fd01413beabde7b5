"""Read batches ahead of training: in processes, which leave signals to it, and in a thread that takes their batches."""

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import get_worker_info

TAKEN = 2  # batches that are here before their step
SECONDS_BETWEEN_LOOKS = 0.2

_is_prepared = False


def prepare_process() -> None:
    """Prepare this process, once, if it is one that reads ahead."""
    global _is_prepared
    if _is_prepared or get_worker_info() is None:
        return
    _is_prepared = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and training ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # their threads did not come along


@contextlib.contextmanager
def name_worker_errors() -> Iterator[None]:
    """Raise the errors of processes that read ahead as they would be raised here, without those processes' tracebacks.

    torch puts the traceback into the message.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines()
        if not lines or not lines[0].startswith("Caught "):
            raise
        raise type(error)(lines[-1].partition(": ")[2] or lines[-1]) from None


class BatchesAhead:
    """Take batches in a thread, so that no step waits while one comes over from the process that made it."""

    def __init__(self, batches: Iterator[Any]):
        self._batches = batches
        self._taken: queue.Queue[tuple[bool, Any]] = queue.Queue(TAKEN)
        self._is_over = threading.Event()
        threading.Thread(target=self._take, daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._is_over.is_set():
            raise StopIteration
        is_batch, found = self._taken.get()
        if is_batch:
            return found
        self._is_over.set()
        raise found

    def stop(self) -> None:
        """End the thread."""
        self._is_over.set()

    def _take(self) -> None:
        try:
            for batch in self._batches:
                if not self._put((True, batch)):
                    return
            self._put((False, StopIteration()))
        except BaseException as error:  # it is raised where the batch is asked for
            self._put((False, error))

    def _put(self, item: tuple[bool, Any]) -> bool:
        while not self._is_over.is_set():
            with contextlib.suppress(queue.Full):
                self._taken.put(item, timeout=SECONDS_BETWEEN_LOOKS)
                return True
        return False
