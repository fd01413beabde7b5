"""Put a run's results where people look for them: `summary.json`, `report.html` and `model` in its folder."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fuselm.system import atomic_files, file_lock
from fuselm.system.disk_errors import name_disk_errors

RECORD = "run.json"  # which of this belongs to the last run file; for this machine, it may name folders elsewhere
PAGES = ("summary.json", "report.html")
LOCK, FRESH, OLD = ".publish.lock", ".model.partial", ".model.old"  # while it is done; a kill leaves them to the next


def publish(run: Path, reported: Path, model: Path, *, key: str, folders: Mapping[str, Path]) -> None:
    """Copy the report and the fused model with its card, each whole or not at all.

    The `folders` that they are from are written down. Nothing is done if they are there already. Other files in `model`
    stay there.
    """
    with name_disk_errors(run), file_lock.hold(run / LOCK):
        _recover(run)
        try:
            before = json.loads((run / RECORD).read_bytes())
        except (FileNotFoundError, ValueError):
            before = {}
        if before.get("report") != key or not all((run / name).exists() for name in (*PAGES, "model")):
            _bring(run, reported, model, before.get("model"), key, folders)


def _recover(run: Path) -> None:
    """Undo what was cut off: the model that was there is there again, or the new one is, and nothing beside it."""
    if (run / OLD).exists() and not (run / "model").exists():
        (run / OLD).rename(run / "model")
    for leftover in (run / FRESH, run / OLD):
        shutil.rmtree(leftover, ignore_errors=True)


def _bring(
    run: Path, reported: Path, model: Path, before: Sequence[str] | None, key: str, folders: Mapping[str, Path]
) -> None:
    for name in PAGES:
        atomic_files.write_file(run / name, lambda path, name=name: shutil.copyfile(reported / name, path))
    place, fresh, old = run / "model", run / FRESH, run / OLD
    shutil.copytree(model, fresh)
    shutil.copyfile(reported / "README.md", fresh / "README.md")
    ours = sorted(path.name for path in fresh.iterdir())
    if place.exists():
        for path in place.iterdir():
            if path.name not in {*ours, *(ours if before is None else before)}:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, fresh / path.name)
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    made = {
        name: str(path.relative_to(run) if path.is_relative_to(run) else path.resolve())
        for name, path in folders.items()
    }
    atomic_files.write_text(run / RECORD, json.dumps({"report": key, "model": ours, "folders": made}, indent=1))
