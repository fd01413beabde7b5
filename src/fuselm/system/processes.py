"""A run's processes, as `accelerate launch` and `torchrun` start them: the first makes every stage, all train."""

import os
import time
from collections.abc import Callable

SECONDS_BETWEEN_LOOKS = 0.2


def rank() -> int:
    """This process's number; 0 is the first, or the only one."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_until(done: Callable[[], bool]) -> None:
    """By looking, not by a collective, which would time out while a stage takes hours. A launcher ends all with one."""
    while not done():
        time.sleep(SECONDS_BETWEEN_LOOKS)
