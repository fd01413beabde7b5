"""Name our command as this process was called, so that what is printed can be pasted into the same shell."""

import os
import shlex
import shutil
import sys
from pathlib import Path

NAME = "fuselm"


def write_command(*arguments: object) -> str:
    """Return a command line of ours, quoted for a shell, that runs from the folder in which this process runs."""
    return shlex.join([*_find_own_words(), *map(str, arguments)])


def _find_own_words() -> list[str]:
    """Return `fuselm` if a shell finds this one by it, else its path, or the module for this Python."""
    called = Path(sys.argv[0])
    if called.name == NAME and called.is_file():
        found = shutil.which(NAME)
        is_found = found is not None and os.path.samefile(found, called)
        return [NAME] if is_found else [_shorten(called)]
    if called.name == "__main__.py" and called.parent.name == NAME:
        return [_shorten(Path(sys.executable)), "-m", NAME]
    return [NAME]


def _shorten(path: Path) -> str:
    """Return the path from the current folder if that is shorter; links stay, as an environment's Python is one."""
    whole = os.path.abspath(path)
    below = os.path.relpath(whole)
    return whole if below.startswith("..") or len(below) > len(whole) else below
