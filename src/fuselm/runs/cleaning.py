"""List the folders of runs with what still needs each, and delete those that nothing needs.

What a run needs is in the records that its commands leave in its folder (`step_records`, `run.json`), so no model and
no text is opened. Every other run beside it is looked at, too, and every run that uses the same `store_dir`.
"""

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fuselm.runs import step_records
from fuselm.runs.publish import RECORD
from fuselm.runs.run_folders import DIAGNOSIS
from fuselm.runs.step_records import RUN_FILE, STUDY_FILE
from fuselm.runs.store_places import FOLDER, find_home
from fuselm.stores.sharing import USERS, list_users
from fuselm.system import file_lock
from fuselm.system.remote_paths import RemotePath
from fuselm.system.remote_stages import remove_folder

STAGES = ("write", "capture", "align", "fuse", "train", "merge")  # folders of other stages are small
PARTIAL, DELETED = ".partial", ".deleted"
RUN_MARKS = (RUN_FILE, STUDY_FILE, RECORD, "config.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """Hold one folder of a stage, and whether it may go."""

    path: Path
    size: int  # bytes
    seconds: float  # since it was last written to
    reason: str  # why it is kept, or why nothing needs it
    is_useless: bool


class _Run:
    """Hold what the records of a run say of the folders that it needs."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.steps = step_records.read_steps(self.folder)
        self.made = {step.folder.resolve() for step in self.steps} | _read_published(self.folder)

    @cached_property
    def needed(self) -> set[Path]:
        """Return the folders that something missing of this run is still to be built from."""
        return {path.resolve() for path in step_records.find_needed(self.steps)}

    @property
    def has_records(self) -> bool:
        """Tell whether it is known what the run needs. It is not if an earlier version did not finish it."""
        return bool(self.made)


def survey(path: Path, *, captures: bool = False, begun: bool = False) -> list[Folder]:
    """List the folders of one run, of a study, or of all runs in a folder, the useless ones first.

    With `captures`, captures count as useless if every run that used them has aligned them. With `begun`, so does what
    an earlier command began with other options, and would resume. Raises `ValueError` if there is no run.
    """
    chosen, shared = _find_runs(path)
    stores = {shared_folder for run in chosen for shared_folder in _find_stores(run)} | set(shared)
    users = {user for store in stores for user in list_users(store)}
    homes = {find_home(run) for run in chosen} | {store.parent for store in stores}
    runs = [_Run(run) for run in sorted({*chosen, *users, *(run for home in homes for run in _list_runs(home))})]
    by_folder = {run.folder: run for run in runs}
    own = {folder.resolve() for run in chosen for folder in by_folder[run.resolve()].made}
    found = []
    for folder in _list_folders([*chosen, *(run / DIAGNOSIS for run in chosen), *sorted(stores)]):
        if folder.is_relative_to(path.resolve()) or _base(folder) in own:
            found.append(_judge(folder, runs, captures, begun))
    return sorted(found, key=lambda folder: (not folder.is_useless, folder.path))


def delete(folder: Path) -> None:
    """Delete a folder of a stage. A kill leaves nothing under its name that could be taken for whole."""
    if isinstance(folder, RemotePath):
        (folder / "manifest.json").unlink(missing_ok=True)
        remove_folder(folder)
        return
    if folder.name.endswith(DELETED):
        hidden = folder
    else:
        hidden = folder.with_name(f".{folder.name}{DELETED}")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
    shutil.rmtree(hidden)


def measure(path: Path) -> int:
    """Return the bytes of all files in a folder; a file that has two names counts once."""
    files = [file.lstat() for file in path.rglob("*") if not file.is_symlink() and file.is_file()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in files}.values())


def _judge(path: Path, runs: Sequence[_Run], captures: bool, begun: bool) -> Folder:
    """Say whether anything needs a folder."""
    base, stage = _base(path), path.parent.name
    users = [run for run in runs if base in run.made]
    waiting = [run for run in runs if base in run.needed]
    unknown = [run for run in runs if not run.has_records and path.is_relative_to(run.folder)]
    is_useless = False
    if path.name.endswith(DELETED):
        reason, is_useless = "left by a deletion that was interrupted", True
    elif file_lock.is_held(path / ".lock"):
        reason = "being made"
    elif unknown:
        reason = f"{_name(unknown)} is not finished, and an earlier version began it"
    elif path.name.endswith(PARTIAL):
        home = [run for run in runs if path.is_relative_to(run.folder)]
        if users:
            reason = f"begun; {_name(users)} resumes it"
        elif home:
            reason, is_useless = f"begun by {_name(home)} with other options, which would resume it", begun
        else:
            reason, is_useless = "begun, and no run is to make it", True
    elif waiting:
        reason = f"needed to finish {_name(waiting)}"
    elif path.parent.parent.name == DIAGNOSIS:
        reason = "used by `fuselm diagnose`"
    elif not users:
        reason, is_useless = "no run uses it", True
    elif captures and stage == "capture":
        reason, is_useless = f"aligned; only other align options of {_name(users)} would need it again", True
    else:
        reason = f"used by {_name(users)}"
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    written = max((stat.st_mtime for stat in files), default=path.stat().st_mtime)
    return Folder(
        path=path,
        size=sum(stat.st_size for stat in files),
        seconds=max(time.time() - written, 0.0),
        reason=reason,
        is_useless=is_useless,
    )


def _find_runs(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the runs that a path names, and the shared folders that it names itself."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; name a run's folder, or the folder that runs are in")
    if _is_run(path):
        return [path], []
    if (path / USERS).is_file():
        return [], [path]
    runs, shared = _list_runs(path), [store for store in (path / FOLDER,) if (store / USERS).is_file()]
    if not runs and not shared:
        raise ValueError(f"{path}: no run in it; name a run's folder, or the folder that runs are in")
    return runs, shared


def _is_run(path: Path) -> bool:
    return any((path / mark).is_file() for mark in RUN_MARKS)


def _list_runs(home: Path) -> list[Path]:
    """List the runs in a folder, and those of the studies in it or of the study that it is."""
    return sorted(path for pattern in ("*", "*/seed-*") for path in home.glob(pattern) if _is_run(path))


def _find_stores(run: Path) -> Iterator[Path]:
    """Yield the folders that a run shares with others."""
    for step in step_records.read_steps(run):
        if (store := step.folder.parent.parent) != run and (store / USERS).is_file():
            yield store


def _list_folders(places: Iterable[Path]) -> list[Path]:
    """List the folders of the stages that may be large."""
    found = [folder for place in places for stage in STAGES for folder in (place / stage).glob("*") if folder.is_dir()]
    return list(dict.fromkeys(folder.resolve() for folder in found))


def _base(path: Path) -> Path:
    """Return the folder that a partial one becomes."""
    return path.with_name(path.name.removesuffix(PARTIAL))


def _read_published(folder: Path) -> set[Path]:
    """Return the folders that a finished run's results are from."""
    try:
        named = json.loads((folder / RECORD).read_bytes())["folders"]
        return {step_records.expand(folder, place).resolve() for place in named.values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()


def _name(runs: Sequence[_Run]) -> str:
    """Name runs by their folders, a study's by the study and the seed."""
    names = [
        f"{r.folder.parent.name}/{r.folder.name}" if r.folder.name.startswith("seed-") else r.folder.name for r in runs
    ]
    return ", ".join(dict.fromkeys(names))
