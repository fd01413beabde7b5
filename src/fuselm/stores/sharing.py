"""Keep in a folder of stores which runs share it, so that their options and their needs can be found."""

import hashlib
import json
from pathlib import Path

from fuselm.system import atomic_files, file_lock
from fuselm.system.remote_paths import RemotePath, open_path

REMOTE_USERS = ".runs"  # in a remote shared folder
USERS = ".runs.json"  # in the shared folder; for this machine, as it holds paths


def add_user(shared: Path, run: Path) -> None:
    """Write down that a run uses a shared folder, which is made if it is not there."""
    if isinstance(shared, RemotePath):  # an object for each run, because there are no locks
        name = hashlib.sha256(str(run).encode()).hexdigest()[:16]
        (shared / REMOTE_USERS / f"{name}.json").write_text(json.dumps([str(run)]))
        return
    shared.mkdir(parents=True, exist_ok=True)
    with file_lock.hold_lock(shared / f"{USERS}.lock"):
        known, run = list_users(shared), run.resolve()
        if run not in known:
            users = sorted(str(path) for path in {*known, run})
            atomic_files.write_text(shared / USERS, json.dumps(users, indent=1))


def list_users(shared: Path) -> list[Path]:
    """Return the folders of the runs that use a shared folder and still are there."""
    files = shared.glob(f"{REMOTE_USERS}/*.json") if isinstance(shared, RemotePath) else [shared / USERS]
    users = [user for file in files for user in _read_users(file)]
    return [path for user in users if (path := open_path(user)).is_dir()]


def _read_users(file: Path) -> list[str]:
    try:
        users = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return []
    return [user for user in users if isinstance(user, str)] if isinstance(users, list) else []
