"""Know a run's processes, as `accelerate launch` and `torchrun` start them: the first makes every stage, all train."""

import os
import time
from collections.abc import Callable

SECONDS_BETWEEN_LOOKS = 0.2


def rank() -> int:
    """Return this process's number; 0 is the first, or the only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


_shard: tuple[int, int] | None = None


def set_worker(number: int, count: int) -> None:
    """Say that this process is one of several that were started apart and share the parts of every stage."""
    global _shard
    _shard = number, count


def leave_workers() -> None:
    """Say that this process shares work with nobody that was started apart, whatever was said before."""
    global _shard
    _shard = None


def is_shard() -> bool:
    """Tell whether this process was started apart from others that it shares work with."""
    return _shard is not None


def worker_number() -> int:
    """Return this process's number among those that share the parts of a stage."""
    return rank() if _shard is None else _shard[0]


def worker_count() -> int:
    """Return how many processes share the parts of a stage, as far as is known."""
    return world_size() if _shard is None else _shard[1]


def wait_until(done: Callable[[], bool]) -> None:
    """Wait until `done()` is true.

    It is asked again and again, because a collective would time out while a stage takes hours. If one process ends,
    the launcher ends the others.
    """
    while not done():
        time.sleep(SECONDS_BETWEEN_LOOKS)
