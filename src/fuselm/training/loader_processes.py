"""Be a process that reads batches ahead for training: leave signals to it, and say what is wrong in one line."""

import contextlib
import os
import signal
from collections.abc import Iterator

from torch.utils.data import get_worker_info

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
