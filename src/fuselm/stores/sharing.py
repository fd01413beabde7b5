"""Keep in a folder of stores which runs share it, so that their options and their needs can be found."""

import json
from pathlib import Path

from fuselm.system import atomic_files, file_lock

USERS = ".runs.json"  # in the shared folder; for this machine, as it holds paths


def add_user(shared: Path, run: Path) -> None:
    """Write down that a run uses a shared folder, which is made if it is not there."""
    shared.mkdir(parents=True, exist_ok=True)
    with file_lock.hold_lock(shared / f"{USERS}.lock"):
        known, run = list_users(shared), run.resolve()
        if run not in known:
            users = sorted(str(path) for path in {*known, run})
            atomic_files.write_text(shared / USERS, json.dumps(users, indent=1))


def list_users(shared: Path) -> list[Path]:
    """Return the folders of the runs that use a shared folder and still are there."""
    try:
        users = json.loads((shared / USERS).read_bytes())
    except (OSError, ValueError):
        return []
    if not isinstance(users, list):
        return []
    return [Path(user) for user in users if isinstance(user, str) and Path(user).is_dir()]
