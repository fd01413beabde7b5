"""Record in a run's folder which folders its last command is to make and from which others they are built.

So another command knows, without models and texts, what a run that is not finished still needs, also of the folders
that it shares with other runs.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuselm.runs.steps import Step
from fuselm.runs.store_places import FOLDER, find_home
from fuselm.system import atomic_files, manifest
from fuselm.system.remote_paths import is_remote, open_path

RUN_FILE = "steps.json"  # of the last command on a run
STUDY_FILE = "study-steps.json"  # of all arms of a study with the seed of this folder


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """Hold what is recorded of a step."""

    stage: str
    name: str
    folder: Path
    inputs: tuple[Path, ...]
    is_asked_for: bool  # not only built because another folder is built from it

    @property
    def title(self) -> str:
        """Return its name in a run's record, such as `capture qwen`."""
        return f"{self.stage} {self.name}".strip()


def write_steps(folder: Path, steps: Iterable[Step], *, file: str = RUN_FILE) -> None:
    """Record the steps of a run, or with `file` those of a study, in the run's folder."""
    rows = {
        step.folder: {
            "stage": step.stage.name,
            "name": step.name,
            "folder": shorten(step.folder, folder),
            "inputs": [shorten(path, folder) for path in step.inputs],
            "asked_for": step.is_asked_for,
        }
        for step in steps
    }
    text = json.dumps(list(rows.values()), indent=1)
    path = folder / file
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        atomic_files.write_text(path, text)


def read_steps(folder: Path) -> list[RecordedStep]:
    """Return all steps that are recorded in a run's folder; none if nothing is recorded or it cannot be read."""
    found = []
    for file in (RUN_FILE, STUDY_FILE):
        try:
            found += [_read_step(folder, row) for row in json.loads((folder / file).read_bytes())]
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return found


def find_needed(steps: Iterable[RecordedStep]) -> set[Path]:
    """Return the folders that something missing is still to be built from, directly."""
    by_folder = {step.folder: step for step in steps}
    waiting = [step for step in by_folder.values() if step.is_asked_for]
    needed: set[Path] = set()
    seen: set[Path] = set()
    while waiting:
        step = waiting.pop()
        if step.folder in seen or manifest.is_finished(step.folder):
            continue
        seen.add(step.folder)
        needed.update(step.inputs)
        waiting += [by_folder[path] for path in step.inputs if path in by_folder]
    return needed


def shorten(path: Path, folder: Path) -> str:
    """Return a path for a record in `folder`: relative if it is in there, else absolute."""
    if path.is_relative_to(folder):
        return str(path.relative_to(folder))
    return str(path) if is_remote(path) else os.path.abspath(path)


def expand(folder: Path, recorded: str) -> Path:
    """Return a path of a record in `folder`. A shared folder that was moved with its runs is found beside them."""
    path = open_path(recorded) if is_remote(recorded) else folder / recorded
    moved = find_home(folder) / FOLDER / path.parent.name / path.name
    return moved if not path.exists() and moved.exists() else path


def _read_step(folder: Path, row: Any) -> RecordedStep:
    return RecordedStep(
        stage=str(row["stage"]),
        name=str(row["name"]),
        folder=expand(folder, row["folder"]),
        inputs=tuple(expand(folder, path) for path in row["inputs"]),
        is_asked_for=bool(row["asked_for"]),
    )
