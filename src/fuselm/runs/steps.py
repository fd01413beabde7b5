"""Make the folders of a run's stages, or list which of them are there.

A folder has its recipe's key in its name. Whatever is there is not made again, whatever changed is made beside it, and
nothing is overwritten. `Maker` makes folders; `Lister` has the same methods and makes none.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from fuselm.runs.stage import Stage
from fuselm.stores import trust
from fuselm.system import manifest, processes, progress
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.terminal import make_plain_text

Build = Callable[[Path, Progress], dict]  # fills a folder, and returns the counts for its manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Describe one folder that a run makes."""

    stage: Stage
    name: str  # of the source, method or model, if the stage has one folder for each
    title: str
    folder: Path
    done: bool


class Steps(Protocol):
    """Say what `Maker` and `Lister` have in common."""

    makes_folders: bool

    def make(
        self, stage: Stage, name: str, recipe: Recipe, build: Build, title: str = "", *, together: bool = False
    ) -> Path:
        """Return the folder of a recipe. All processes build it where it is built `together`."""
        ...

    def use_existing(self, stage: Stage, name: str, folder: Path, key: str) -> Path:
        """Return a folder that the user has, in place of one that the run would make."""
        ...

    def get_key(self, folder: Path) -> str:
        """Return what identifies the content of a folder that was returned before."""
        ...


class Maker:
    """Make the folders that are missing in `folder`. `has_made_anything` says whether any was missing."""

    makes_folders = True

    def __init__(self, folder: Path, console: Console, *, choose_precision: Callable[[], object]):
        self._folder = folder
        self._console = console
        self._choose_precision = choose_precision  # called before a stage that needs it
        self._keys: dict[Path, str] = {}
        self.has_made_anything = False

    def make(
        self, stage: Stage, name: str, recipe: Recipe, build: Build, title: str = "", *, together: bool = False
    ) -> Path:
        """Return the folder of a recipe; make it if it is not there. All processes build it where it is `together`."""
        folder = _name_folder(self._folder, stage, name, recipe)
        self._keys[folder] = recipe.key
        if manifest.is_finished(folder):
            if processes.rank() == 0:
                manifest.remove_stale_lock(folder)
            return folder
        title = _name_step(stage, title or name)
        self._console.print(make_plain_text(title, style="bold"))
        if stage.needs_precision:
            self._choose_precision()
        began = time.monotonic()
        with progress.show_progress(self._console, title) as shown:
            manifest.build_once(folder, recipe, lambda out: build(out, shown), together=together)
            trust.remember_output(folder)
        done_in = make_plain_text(f"  done in {time.monotonic() - began:,.1f} s  ")
        self._console.print(done_in.append_text(make_plain_text(str(folder), style="dim")), soft_wrap=True)
        self.has_made_anything = True
        return folder

    def use_existing(self, stage: Stage, name: str, folder: Path, key: str) -> Path:
        """Return a folder that the user has, in place of one that the run would make."""
        self._keys[folder] = key
        return folder

    def get_key(self, folder: Path) -> str:
        """Return what identifies the content of a folder that was returned before."""
        return self._keys[folder]


class Lister:
    """List the folders that a run would make in `folder`, and make none. `steps` holds them by their folders."""

    makes_folders = False

    def __init__(self, folder: Path):
        self._folder = folder
        self._keys: dict[Path, str] = {}
        self.steps: dict[Path, Step] = {}

    def make(
        self, stage: Stage, name: str, recipe: Recipe, build: Build, title: str = "", *, together: bool = False
    ) -> Path:
        """Return the folder that a recipe would be made in, whether or not it is there."""
        folder = _name_folder(self._folder, stage, name, recipe)
        self._keys[folder] = recipe.key
        title, done = _name_step(stage, title or name), manifest.is_finished(folder)
        self.steps[folder] = Step(stage=stage, name=name, title=title, folder=folder, done=done)
        return folder

    def use_existing(self, stage: Stage, name: str, folder: Path, key: str) -> Path:
        """Return a folder that the user has, in place of one that the run would make."""
        self._keys[folder] = key
        self.steps[folder] = Step(stage=stage, name=name, title=_name_step(stage, name), folder=folder, done=True)
        return folder

    def get_key(self, folder: Path) -> str:
        """Return what identifies the content of a folder that was returned before."""
        return self._keys[folder]


def _name_folder(run_folder: Path, stage: Stage, name: str, recipe: Recipe) -> Path:
    return run_folder / stage.name / f"{name}-{recipe.key}".lstrip("-")


def _name_step(stage: Stage, title: str) -> str:
    return f"{stage.name} {title}".strip()
