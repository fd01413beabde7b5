"""Publish the results of a run in its folder: `summary.json`, `report.html` and `model`."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fuselm.runs import step_records
from fuselm.system import atomic_files, file_lock, local_copies
from fuselm.system.disk_errors import name_disk_errors
from fuselm.system.remote_paths import RemotePath

RECORD = "run.json"  # names the folders of the last run file; for this machine only, as they may be elsewhere
PAGES = ("summary.json", "report.html")
LOCK, FRESH, OLD = (
    ".publish.lock",
    ".model.partial",
    ".model.old",
)  # while results are published; the next call removes them after a kill


def publish(run: Path, reported: Path, model: Path, *, key: str, folders: Mapping[str, Path]) -> None:
    """Copy the report and the fused model with its card, each whole or not at all.

    The `folders` that they are from are recorded. Nothing is copied if the results are already there. Other files in
    `model` stay there.
    """
    with name_disk_errors(run), file_lock.hold_lock(run / LOCK):
        if not isinstance(run, RemotePath):
            _clean_up(run)
        try:
            before = json.loads((run / RECORD).read_bytes())
        except (FileNotFoundError, ValueError):
            before = {}
        if before.get("report") != key or not all((run / name).exists() for name in (*PAGES, "model")):
            copy = _send_results if isinstance(run, RemotePath) else _copy_results
            copy(run, reported, model, before.get("model"), key, folders)


def _clean_up(run: Path) -> None:
    """Clean up after a kill: leave the old model or the new one, whole, and nothing else."""
    if (run / OLD).exists() and not (run / "model").exists():
        (run / OLD).rename(run / "model")
    for leftover in (run / FRESH, run / OLD):
        shutil.rmtree(leftover, ignore_errors=True)


def _send_results(
    run: RemotePath, reported: Path, model: Path, before: Sequence[str] | None, key: str, folders: Mapping[str, Path]
) -> None:
    """Copy to a remote folder, where nothing can be renamed: without its record, a model is not whole."""
    (run / RECORD).unlink(missing_ok=True)
    weights = local_copies.fetch_folder(model)
    files = {str(path.relative_to(weights)): path for path in sorted(weights.rglob("*")) if path.is_file()}
    for name in PAGES:
        (run / name).write_bytes((reported / name).read_bytes())
    for name in set(before or ()) - {*files, "README.md"}:
        (run / "model" / name).unlink(missing_ok=True)
    for name, path in files.items():
        (run / "model" / name).send(path)
    (run / "model" / "README.md").write_bytes((reported / "README.md").read_bytes())
    _record(run, sorted({*(name.split("/")[0] for name in files), "README.md"}), key, folders)


def _copy_results(
    run: Path, reported: Path, model: Path, before: Sequence[str] | None, key: str, folders: Mapping[str, Path]
) -> None:
    for name in PAGES:
        atomic_files.write_file(run / name, lambda path, name=name: shutil.copyfile(reported / name, path))
    place, fresh, old = run / "model", run / FRESH, run / OLD
    shutil.copytree(model, fresh)
    shutil.copyfile(reported / "README.md", fresh / "README.md")
    atomic_files.share_modes(fresh)
    ours = sorted(path.name for path in fresh.iterdir())
    if place.exists():
        for path in place.iterdir():
            if path.name not in {*ours, *(ours if before is None else before)}:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, fresh / path.name)
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    _record(run, ours, key, folders)


def _record(run: Path, ours: Sequence[str], key: str, folders: Mapping[str, Path]) -> None:
    made = {name: step_records.shorten(path, run) for name, path in folders.items()}
    atomic_files.write_text(run / RECORD, json.dumps({"report": key, "model": list(ours), "folders": made}, indent=1))
