"""Check where a page is to be written, before anything is measured."""

import os
from pathlib import Path


def check_report_path(path: Path) -> None:
    """Raise `ValueError` if no page can or should be written to `path`."""
    if not path.parent.is_dir():
        raise ValueError(f"--report {path}: no folder {path.parent}; make it, or name a file in another")
    if path.is_dir():
        raise ValueError(f"--report {path}: a folder; name a file, such as {path / 'page.html'}")
    if path.exists() and path.suffix not in (".html", ".htm"):
        raise ValueError(f"--report {path}: there already, and no HTML page; name another file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--report {path}: cannot write in {path.parent}; name a file elsewhere")
