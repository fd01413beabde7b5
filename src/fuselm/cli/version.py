"""Define `--version`, which prints the version and ends the command."""

from typing import Annotated

import typer

from fuselm.system.streams import print_line


def _print_version(is_asked: bool) -> bool:
    """Print the version and end the command if `is_asked`; return the value of the flag."""
    if is_asked:
        from fuselm import __version__

        print_line(f"fuselm {__version__}")
        raise typer.Exit
    return is_asked


VersionOption = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
]
