"""End a command: with an exit code, and at most one line on stderr.

Exit code 2 says that the user can fix it (`ValueError`, or the system refused). Ctrl-C and SIGTERM stop a command (130,
143), after a checkpoint where it trains, and the last line says what the next call does; a second one stops it at once.
If nobody reads its output, a command ends in silence (141). Anything else is a bug of ours, and keeps its traceback.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from fuselm.system import processes, stopping
from fuselm.system.foreign_text import put_on_one_line
from fuselm.system.streams import OutputClosed, prepare_streams

STOPPING = (signal.SIGINT, signal.SIGTERM)
RESUMED = ("run", "capture", "align", "fuse", "train", "evaluate", "report", "study", "diagnose", "fidelity")
RESUMED += ("merge", "prune", "push", "store push", "store pull")  # commands whose work the same command resumes
WRITES_NOTHING = ("--check", "--plan", "--texts", "--dry-run")  # options with which they leave nothing to resume
LONGEST = 2000  # characters of a line; names that others chose may be endless


def is_resumed(arguments: Sequence[str]) -> bool:
    """Tell whether the command of these arguments leaves work that the same command resumes."""
    words = " ".join(argument for argument in arguments[:2] if not argument.startswith("-"))
    is_known = any(words == name or words.startswith(f"{name} ") for name in RESUMED)
    return is_known and not any(argument.partition("=")[0] in WRITES_NOTHING for argument in arguments)


def run_command(command: Callable[[], int], *, resumes: bool = True) -> int:
    """Run a command that returns an exit code, and return the code to end with, whatever happens.

    `resumes` says whether the same command resumes its work once the system's refusal is dealt with.
    """
    try:
        prepare_streams()
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # which nohup and `&` set
                signal.signal(number, _stop)
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except ValueError as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"out of memory ({error or 'no details'}); make batches smaller, or take a larger machine")
    except stopping.Stopped as stopped:
        if processes.rank() == 0:
            _print_line(stopping.describe_resumption())
        return 128 + stopped.args[0]
    except (OutputClosed, BrokenPipeError):
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        again = "fix this and run the same command again" + ("; it resumes here" if resumes else "")
        return _fail(f"{where}{os.strerror(error.errno)}; {again}")
    finally:
        for number in STOPPING:  # nothing catches `Stopped` any more
            if signal.getsignal(number) is _stop:
                signal.signal(number, _stop_at_once)
        _flush_streams()


def _stop(number: int, _: FrameType | None) -> None:
    for other in STOPPING:
        signal.signal(other, _stop_at_once)
    stopping.request(number)


def _stop_at_once(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def _fail(message: str) -> int:
    _print_line(message)
    return 2


def _print_line(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads stderr
        line = put_on_one_line(message)
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} […] {line[-LONGEST // 2 :]}"
        print(f"fuselm: {line}", file=sys.stderr, flush=True)


def _flush_streams() -> None:
    """Flush stdout and stderr, or drop what nobody takes, so that Python reports nothing when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
