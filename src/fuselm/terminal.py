"""The one way to a terminal: consoles on which no string is markup, and lines in which nothing acts."""

import io
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from fuselm.foreign_text import escape_controls


class PlainConsole(Console):
    """A console that takes strings, in cells and headings of tables too, for text: no markup, emoji or escapes."""

    def render_str(self, text: str, *, style: Any = "", **options: Any) -> Text:
        """Return the characters of `text` as they are seen."""
        result = plain(text)
        result.stylize(style)
        result.justify, result.overflow = options.get("justify"), options.get("overflow")
        return result


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console on stdout or stderr."""
    return PlainConsole(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


def plain(text: str, style: str = "") -> Text:
    """Return text for a console, with escapes for the characters that act instead of being seen."""
    return Text(escape_controls(text), style=style)


def print_line(text: object, *, file: TextIO | None = None) -> None:
    """Print one line of text, with escapes for the characters that act instead of being seen."""
    print(escape_controls(str(text)), file=file)


def accept_every_character() -> None:
    """Let stdout and stderr write what their encoding lacks as escapes, where they would raise `UnicodeEncodeError`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
