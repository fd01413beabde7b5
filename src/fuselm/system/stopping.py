"""Stop when the user asks: at once, or after the step of a training that is under way and can be kept.

The command line turns SIGINT and SIGTERM into `request`. From Python, where it is never called, nothing here happens.
"""

import contextlib
import os

from fuselm.system import processes

NOTICE = b"\nfuselm: stopping; again, and it stops at once\n"

_is_held = False
_requested: int | None = None  # the signal
_resumption = ""


class Stopped(BaseException):
    """Report a signal that asks to stop. The command parser would handle a KeyboardInterrupt itself."""


def request(number: int) -> None:
    """Raise `Stopped`, or remember the signal while a step is held. Say so at once, as work may take seconds to end."""
    global _requested
    if processes.rank() == 0:
        with contextlib.suppress(OSError):
            os.write(2, NOTICE)  # print may be at work when a signal comes
    if not _is_held:
        raise Stopped(number)
    _requested = number


def hold() -> None:
    """Let signals wait until `raise_if_requested` or `release`. Of several processes, none waits for the others."""
    global _is_held
    _is_held = processes.world_size() == 1


def release() -> None:
    """Let signals stop the command at once again."""
    global _is_held, _requested
    _is_held, _requested = False, None


def is_requested() -> bool:
    """Tell whether a signal waits."""
    return _requested is not None


def raise_if_requested() -> None:
    """Raise `Stopped` if a signal waits."""
    if (number := _requested) is not None:
        release()
        raise Stopped(number)


def note_resumption(text: str) -> None:
    """Note what the same command will do if it is stopped now; empty if nothing would be resumed."""
    global _resumption
    _resumption = text


def describe_resumption() -> str:
    """Return the line that a stopped command ends with."""
    return f"stopped; run the same command again and {_resumption}" if _resumption else "stopped"
