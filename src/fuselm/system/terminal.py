"""Write to a terminal: on these consoles no string is markup, and no character of a text takes effect."""

import os
from io import TextIOBase
from typing import Any

from rich.console import Console
from rich.text import Text

from fuselm.system.foreign_text import escape_controls
from fuselm.system.streams import OutputClosed

COLUMNS_OFF_TERMINAL = 10_000  # so that a file or a pipe gets each row of a table on one line


class PlainConsole(Console):
    """Print strings, in cells and headings of tables too, as plain text: no markup, emoji or escapes."""

    def render_str(self, text: str, *, style: Any = "", **options: Any) -> Text:
        """Return the characters of `text` as they are seen."""
        result = make_plain_text(text)
        result.stylize(style)
        result.justify, result.overflow = options.get("justify"), options.get("overflow")
        return result

    def on_broken_pipe(self) -> None:
        """End the command as for any output that nobody reads."""
        raise OutputClosed from None


def open_console(*, stderr: bool = False, quiet: bool = False, file: TextIOBase | None = None) -> Console:
    """Return a console on stdout, stderr or `file`.

    Off a terminal nothing is wrapped, unless the environment's COLUMNS says how wide a line may be.
    """
    console = PlainConsole(file=file, stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and (file is not None or not os.environ.get("COLUMNS", "").isdigit()):
        console.width = COLUMNS_OFF_TERMINAL
    return console


def make_plain_text(text: str, style: str = "") -> Text:
    """Return text for a console, with escapes for the characters that act instead of being seen."""
    return Text(escape_controls(text), style=style)
