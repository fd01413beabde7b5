"""The folders that a run's stages are made in: which of them are there, and the making of the others.

A folder has its recipe's key in its name, so whatever is there need not be made again, whatever changed is made beside
it, and nothing is overwritten.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fuselm.stores import trust
from fuselm.system import manifest, processes, progress
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.terminal import plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One folder that a run makes."""

    stage: str
    name: str  # of the source, method or model, if the stage has one folder for each
    title: str
    folder: Path
    done: bool


class Steps:
    """Of one run. `worked` says whether any was made."""

    def __init__(self, folder: Path, console: Console, *, begin: Callable[[], object] = lambda: None):
        self._begin = begin  # called before anything but the corpus is made
        self.folder = folder
        self.console = console
        self.worked = False
        self.looking = False  # then nothing is made
        self._seen: dict[Path, Step] = {}
        self._keys: dict[Path, str] = {}

    def key(self, folder: Path) -> str:
        """What identifies the content of a folder that was gone through."""
        return self._keys[folder]

    def of(self, making: Callable[[], object]) -> list[Step]:
        """Those that `making` something goes through."""
        self.looking, self._seen = True, {}
        making()
        self.looking = False
        return list(self._seen.values())

    def take(self, stage: str, name: str, folder: Path, key: str) -> Path:
        """A folder that the user has, in place of one of the run's."""
        self._keys[folder] = key
        self._seen[folder] = Step(stage=stage, name=name, title=f"{stage} {name}", folder=folder, done=True)
        return folder

    def make(
        self,
        stage: str,
        name: str,
        recipe: Recipe,
        build: Callable[[Path, Progress], dict],
        title: str = "",
        *,
        together: bool = False,
    ) -> Path:
        """The folder of a recipe, made if it is not there; `together` by all processes."""
        folder = self.folder / stage / f"{name}-{recipe.key}".lstrip("-")
        self._keys[folder] = recipe.key
        title = f"{stage} {title or name}".strip()
        done = manifest.is_finished(folder)
        self._seen[folder] = Step(stage=stage, name=name, title=title, folder=folder, done=done)
        if done and not self.looking and processes.rank() == 0:
            manifest.sweep(folder)
        if done or self.looking:
            return folder
        self.console.print(plain(title, style="bold"))
        if stage not in ("corpus", "report"):
            self._begin()
        began = time.monotonic()
        with progress.show(self.console, title) as shown:
            manifest.build_once(folder, recipe, lambda out: build(out, shown), together=together)
            trust.remember_made(folder)
        done_in = plain(f"  done in {time.monotonic() - began:,.1f} s  ")
        self.console.print(done_in.append_text(plain(str(folder), style="dim")), soft_wrap=True)
        self.worked = True
        return folder
