"""Publish the results of a run in its folder: `summary.json`, `report.html` and `model`."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fuselm.runs import step_records
from fuselm.system import atomic_files, file_lock
from fuselm.system.disk_errors import name_disk_errors

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
        _clean_up(run)
        try:
            before = json.loads((run / RECORD).read_bytes())
        except (FileNotFoundError, ValueError):
            before = {}
        if before.get("report") != key or not all((run / name).exists() for name in (*PAGES, "model")):
            _copy_results(run, reported, model, before.get("model"), key, folders)


def _clean_up(run: Path) -> None:
    """Clean up after a kill: leave the old model or the new one, whole, and nothing else."""
    if (run / OLD).exists() and not (run / "model").exists():
        (run / OLD).rename(run / "model")
    for leftover in (run / FRESH, run / OLD):
        shutil.rmtree(leftover, ignore_errors=True)


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
    made = {name: step_records.shorten(path, run) for name, path in folders.items()}
    atomic_files.write_text(run / RECORD, json.dumps({"report": key, "model": ours, "folders": made}, indent=1))
