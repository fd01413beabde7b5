"""Find the folder of a recipe: in the run's folder, or where runs that have the same recipe share it.

Texts that sources wrote, captures and aligned stores cost hours and depend on nothing but their recipe, so all runs and
studies beside each other keep them in one folder, `store_dir`. What earlier versions of fuselm left in the folders of
runs is found, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fuselm.runs.config import RunOptions
from fuselm.runs.stage import Stage
from fuselm.stores import sharing
from fuselm.system import manifest
from fuselm.system.remote_paths import open_path

FOLDER = "stores"  # beside the runs
STUDY_FILE = "study.json"  # in a study's folder, whose runs are in folders named after their seeds


def find_home(output: Path) -> Path:
    """Return the folder that a run is in, or the study that it is a seed of."""
    return output.parent.parent if (output.parent / STUDY_FILE).is_file() else output.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlaces:
    """Hold where the folders of one run are.

    `shared` is its `store_dir`, or None if it shares nothing. A folder that was found once stays the one for its
    recipe, so that all stages of a run agree on it.
    """

    run: Path
    shared: Path | None
    _found: dict[tuple[str, str], Path] = field(default_factory=dict)

    def find(self, stage: Stage, name: str, key: str) -> Path:
        """Return the folder of a stage with this key, whether or not it is there; a new one is named after `name`."""
        new = f"{name}-{key}".lstrip("-")
        if self.shared is None or not stage.is_shared:
            return self.run / stage.name / new
        known = self._found.get((stage.name, key))
        if known is None or not (manifest.is_finished(known) or self._owns(known)):
            known = self._found[stage.name, key] = self._find_shared(self.shared, stage.name, new, key)
        return known

    def list_finished(self, stage: Stage) -> list[Path]:
        """List the finished folders of a stage in all places, each once."""
        found = [path for place in self._list_places(stage.name) for path in sorted((place / stage.name).glob("*"))]
        finished = [
            path for path in found if path.suffix not in (".partial", ".deleted") and manifest.is_finished(path)
        ]
        return list({path.resolve(): path for path in finished}.values())

    def register(self) -> None:
        """Write down in the shared folder that this run uses it, wherever the run is."""
        if self.shared is not None:
            sharing.add_user(self.shared, self.run)

    def _find_shared(self, shared: Path, stage: str, new: str, key: str) -> Path:
        begun_here = self.run / stage / f"{new}.partial"
        for place in self._list_places(stage):
            for path in sorted((place / stage).glob(f"*-{key}")):
                if manifest.is_finished(path):
                    return path
        if begun_here.is_dir():  # by an earlier version
            return begun_here.with_suffix("")
        begun = sorted((shared / stage).glob(f"*-{key}.partial"))  # maybe under another run's name of the source
        return begun[0].with_suffix("") if begun else shared / stage / new

    def _list_places(self, stage: str) -> Iterator[Path]:
        """Yield the folders that may have folders of a stage, the most likely first."""
        yield self.run
        if self.shared is not None:
            yield self.shared
            yield self.run.parent / FOLDER
            home = find_home(self.run)
            yield from sorted(path.parent for path in [*home.glob(f"*/{stage}"), *home.glob(f"*/seed-*/{stage}")])

    def _owns(self, folder: Path) -> bool:
        """Tell whether this run may make a folder, which is not in the folder of another run."""
        return any(place is not None and folder.is_relative_to(place) for place in (self.run, self.shared))


def locate_stores(run: RunOptions) -> StorePlaces:
    """Return where the folders of a run are, by its options `output` and `store_dir`."""
    output = open_path(run.output)
    shared = find_home(output) / FOLDER if run.store_dir == "auto" else run.store_dir
    return StorePlaces(run=output, shared=None if shared is None else open_path(shared))
