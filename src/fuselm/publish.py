"""A run's results, where people look for them: `summary.json`, `report.html` and `model` in the run's folder."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fuselm import manifest

RECORD = "run.json"  # what of this is the last run file's
PAGES = ("summary.json", "report.html")


def publish(run: Path, reported: Path, model: Path, *, key: str, folders: Mapping[str, Path]) -> None:
    """Copy the report, and the fused model with its card, each whole or not at all; and write down the `folders` they
    are from. Nothing is done if they are there. What else lies in `model` stays there.
    """
    record = run / RECORD
    try:
        before = json.loads(record.read_bytes())
    except (FileNotFoundError, ValueError):
        before = {}
    if before.get("report") == key and all((run / name).exists() for name in (*PAGES, "model")):
        return
    with manifest.full_disk_named(run):
        _bring(run, reported, model, before.get("model"), key, folders)


def _bring(
    run: Path, reported: Path, model: Path, before: Sequence[str] | None, key: str, folders: Mapping[str, Path]
) -> None:
    for name in PAGES:
        manifest.write_bytes(run / name, lambda path, name=name: shutil.copyfile(reported / name, path))
    place, fresh, old = run / "model", run / "model.partial", run / "model.old"
    if old.exists() and not place.exists():  # cut off between the two renames
        old.rename(place)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
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
    manifest.write_text(run / RECORD, json.dumps({"report": key, "model": ours, "folders": made}, indent=1))
