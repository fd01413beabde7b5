"""List the folders that GGUF files were converted to, which all runs share, and delete them.

A deleted one is made again, about a minute for each model, when a command next reads the GGUF file.
"""

import fcntl
import json
import time
from pathlib import Path

from fuselm.runs.cleaning import Folder
from fuselm.system import fingerprints


def find_folder() -> Path:
    """Return the folder that holds them, in fuselm's cache."""
    return fingerprints.find_cache_folder() / "gguf"


def survey() -> list[Folder]:
    """List the converted models, each as useless unless a process is making it."""
    folder = find_folder()
    places = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [_describe(path) for path in places]


def measure() -> int:
    """Return the bytes of all of them."""
    return sum(folder.size for folder in survey())


def _describe(path: Path) -> Folder:
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    read = max((stat.st_atime for stat in files), default=path.stat().st_mtime)
    is_held = _is_held(path.with_suffix(".lock"))
    return Folder(
        path=path,
        size=sum(stat.st_size for stat in files),
        seconds=max(time.time() - read, 0.0),
        reason="being made" if is_held else f"{_read_kind(path)}; made again when its GGUF file is read",
        is_useless=not is_held,
    )


def _read_kind(path: Path) -> str:
    """Return the kind of model, as its configuration names it; a conversion that was killed has none."""
    try:
        return str(json.loads((path / "config.json").read_bytes())["model_type"])
    except (OSError, ValueError, LookupError, TypeError):
        return "no model"


def _is_held(lock: Path) -> bool:
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
