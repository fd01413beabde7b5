"""Make stages whose folders are remote: in a copy on this machine, as others are made, and then sent, manifest last.

So whatever libraries write is written to a disk, and work that was interrupted resumes from that disk.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuselm.system import local_copies, manifest, processes
from fuselm.system.manifest import Recipe
from fuselm.system.remote_paths import RemotePath


def build_remotely(
    folder: RemotePath,
    recipe: Recipe,
    build: Callable[[Path], dict[str, Any]],
    *,
    together: bool,
    on_wait: Callable[[], object] | None,
) -> bool:
    """Fill a remote folder as `manifest.build_once` does one of this machine. Return whether anything was done."""
    if manifest.is_finished(folder):
        return False
    copy = local_copies.locate_copy(folder)
    if processes.rank() == 0 and copy.exists() and not manifest.is_finished(copy):  # some files of an earlier one
        shutil.rmtree(copy)
    manifest.build_once(copy, recipe, build, together=together, on_wait=on_wait)
    if processes.rank() == 0:
        local_copies.send_folder(copy, folder)
    processes.wait_until(lambda: manifest.is_finished(folder))
    return True


def reopen_remotely(folder: RemotePath) -> None:
    """Let a finished remote stage be built again from the files it has."""
    manifest.reopen_stage(local_copies.fetch_folder(folder))
    (folder / "manifest.json").unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder with everything in it, and its copy on this machine if it is remote; do nothing without one."""
    if isinstance(folder, RemotePath):
        folder.remove_tree()
        folder = local_copies.locate_copy(folder)
    shutil.rmtree(folder, ignore_errors=True)
