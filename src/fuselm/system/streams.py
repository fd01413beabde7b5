"""Write to stdout and stderr, whatever characters their encoding has, and whether or not somebody reads them."""

import io
import os
import sys

from fuselm.system.foreign_text import escape_controls


class OutputClosed(BaseException):
    """Say that nobody reads our output any more. Not an `OSError`, which the command parser would catch."""


def prepare_streams() -> None:
    """Let stdout and stderr write what their encoding lacks as escapes, where they would raise `UnicodeEncodeError`.

    One that is closed leads nowhere, so that no file of ours gets its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_line(text: object) -> None:
    """Print one line on stdout, with escapes for the characters that act instead of being seen.

    Raises `OutputClosed` where nobody reads it.
    """
    try:
        print(escape_controls(str(text)))
    except BrokenPipeError:
        raise OutputClosed from None
