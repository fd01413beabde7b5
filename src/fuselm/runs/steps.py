"""Declare the folders of a run's stages, and make those that are missing and needed.

A folder has its recipe's key in its name. A finished folder is never made again, another recipe has another folder
beside it, and nothing is overwritten. A stage declares its folder and what that is built from, and makes nothing by
that: a folder is made when a command asks for it, or when another one is built from it. So a capture that was deleted
is not made again as long as the stores that were aligned from it are there.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from fuselm.runs.remaining_time import RemainingTime
from fuselm.runs.stage import Stage
from fuselm.runs.store_places import StorePlaces
from fuselm.stores import trust
from fuselm.system import machine, manifest, part_work, processes, progress, stopping
from fuselm.system.durations import format_duration
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.terminal import make_plain_text

# fills a folder, and returns the counts for its manifest; None if it is made by parts and another process finished it
Build = Callable[[Path, Progress], dict | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Describe one folder of a run, as it is found by a dry run."""

    stage: Stage
    name: str  # of the source, method or model, if the stage has one folder for each
    title: str
    folder: Path
    recipe: Recipe | None  # None: the user has the folder
    inputs: Sequence[Path]  # folders that it is built from
    done: bool
    is_asked_for: bool  # not only an input of others
    is_needed: bool  # not done, and asked for or an input of another folder that is


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """Hold what a stage declared of one folder."""

    stage: Stage
    name: str
    title: str
    folder: Path
    recipe: Recipe | None
    build: Build | None
    inputs: Sequence[Path]
    together: bool = False
    by_parts: bool = False


class Steps:
    """Hold the folders that the stages of a run declared, and let `maker` make the missing ones.

    Without a maker this is a dry run: what would be made is listed, and nothing is made.
    """

    def __init__(self, places: StorePlaces, maker: "Maker | None" = None):
        self._places = places
        self._maker = maker
        self._declared: dict[Path, Declared] = {}
        self._keys: dict[Path, str] = {}
        self._asked_for: dict[Path, None] = {}

    @property
    def makes_folders(self) -> bool:
        """Tell whether this is not a dry run."""
        return self._maker is not None

    def declare(
        self,
        stage: Stage,
        name: str,
        recipe: Recipe,
        build: Build,
        title: str = "",
        *,
        inputs: Sequence[Path] = (),
        together: bool = False,
        by_parts: bool = False,
    ) -> Path:
        """Return the folder of a recipe, which `build` fills from other declared folders, `inputs`; make nothing.

        All processes of a run build it `together`, or each makes some of its parts (part_work.py), or only the first
        builds it.
        """
        folder = self._places.find(stage, name, recipe.key)
        self._keys[folder] = recipe.key
        self._declared[folder] = Declared(
            stage=stage,
            name=name,
            title=f"{stage.name} {title or name}".strip(),
            folder=folder,
            recipe=recipe,
            build=build,
            inputs=tuple(inputs),
            together=together,
            by_parts=by_parts,
        )
        return folder

    def declare_existing(self, stage: Stage, name: str, folder: Path, key: str) -> Path:
        """Return a folder that the user has, in place of one that the run would make."""
        self._keys[folder] = key
        self._declared[folder] = Declared(
            stage=stage,
            name=name,
            title=f"{stage.name} {name}",
            folder=folder,
            recipe=None,
            build=None,
            inputs=(),
        )
        return folder

    def make(self, folder: Path) -> Path:
        """Return a declared folder. If it is missing, make it and what it is built from."""
        self.make_all([folder])
        return folder

    def make_all(self, folders: Collection[Path]) -> None:
        """Make the missing ones of these declared folders and what they are built from, in the order of stages."""
        self._asked_for.update(dict.fromkeys(folders))
        if self._maker is None:
            return
        needed = self._find_needed(folders)
        for declared in [d for d in self._declared.values() if d.folder in needed]:
            self._maker.make(declared)
        for folder in set(folders) - needed:
            if self._declared[folder].recipe is not None and processes.rank() == 0:
                manifest.remove_stale_lock(folder)

    def get_key(self, folder: Path) -> str:
        """Return what identifies the content of a declared folder."""
        return self._keys[folder]

    def list_steps(self) -> list[Step]:
        """Return all declared folders in the order of their stages, and say which have to be made."""
        needed = self._find_needed(self._asked_for)
        return [
            Step(
                stage=declared.stage,
                name=declared.name,
                title=declared.title,
                folder=folder,
                recipe=declared.recipe,
                inputs=declared.inputs,
                done=_is_done(declared),
                is_asked_for=folder in self._asked_for,
                is_needed=folder in needed,
            )
            for folder, declared in self._declared.items()
        ]

    def _find_needed(self, wanted: Iterable[Path]) -> set[Path]:
        """Return the missing ones of the wanted folders, and the missing ones that those are built from."""
        needed: set[Path] = set()
        waiting = list(wanted)
        while waiting:
            folder = waiting.pop()
            if folder not in needed and not _is_done(self._declared[folder]):
                needed.add(folder)
                waiting += self._declared[folder].inputs
        return needed


class Maker:
    """Make folders, and show that on `console`. `has_made_anything` says whether any was made."""

    def __init__(
        self,
        console: Console,
        *,
        choose_precision: Callable[[], object],
        find_helpers: Callable[[Stage, Path], object] = lambda stage, folder: None,
        delegate: Callable[[Declared, Progress], bool] = lambda declared, shown: False,
        only: Path | None = None,
    ):
        self._console = console
        self._find_helpers = find_helpers  # called before a folder is made by parts
        self._delegate = delegate  # lets others make a folder, and tells whether they did
        self._only = only  # the folder that is made, in a process that helps another one with it
        self._choose_precision = choose_precision  # called before a stage that needs it
        self.has_made_anything = False
        self.remaining = RemainingTime({}, is_measured=False)  # of the steps that are foreseen

    def make(self, declared: Declared) -> None:
        """Make one folder whose inputs are there."""
        folder, recipe, build = declared.folder, declared.recipe, declared.build
        if self._only not in (None, folder):
            return
        assert recipe is not None and build is not None
        which = self.remaining.describe(folder)
        self._console.print(
            make_plain_text(f"{declared.title}{which and f'  ({which})'}", style="bold"), soft_wrap=True
        )
        if declared.stage.needs_precision:
            self._choose_precision()
        began = time.monotonic()
        stopping.note_resumption(f"it resumes in {declared.title}")
        with progress.show_progress(self._console, declared.title) as shown:
            on_wait = partial(_note_waiting, shown)
            if self._delegate(declared, shown):
                pass
            elif declared.by_parts:
                if self._only is None:
                    self._find_helpers(declared.stage, folder)
                part_work.build_by_parts(folder, recipe, lambda out: build(out, shown), on_wait=on_wait)
            else:
                manifest.build_once(
                    folder,
                    recipe,
                    lambda out: build(out, shown),
                    together=declared.together,
                    on_wait=on_wait if declared.stage.is_shared or processes.is_shard() else None,
                )
            trust.remember_output(folder)
        machine.release_memory()
        stopping.note_resumption("it resumes after that")
        self.remaining.count(folder, time.monotonic() - began)
        done_in = make_plain_text(f"  done in {format_duration(time.monotonic() - began)}  ")
        self._console.print(done_in.append_text(make_plain_text(str(folder), style="dim")), soft_wrap=True)
        self.has_made_anything = True


def _note_waiting(shown: Progress) -> None:
    shown.note("another fuselm process is making this; waiting for it")


def _is_done(declared: Declared) -> bool:
    """Tell whether a folder is there. What a user has counts as there: it was opened when it was declared."""
    return declared.recipe is None or manifest.is_finished(declared.folder)
