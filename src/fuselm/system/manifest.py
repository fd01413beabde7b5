"""Make each stage once: a stage is a recipe and a function that fills a folder.

`build_once` runs the function in `<folder>.partial` and, once it is done, writes `manifest.json` there and renames the
folder to its final name. So a folder with its final name is complete, a `.partial` one can be resumed, and a folder
that has the recipe's key in its name never has to be overwritten: another recipe is another folder. Remote folders have
no partial ones: they are sent, manifest last (remote_stages.py).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuselm.system import atomic_files, file_lock, processes
from fuselm.system.disk_errors import name_disk_errors
from fuselm.system.remote_paths import RemotePath

FORMAT = 3  # of every folder that fuselm writes; docs/store.md
_SHA256 = re.compile("[0-9a-f]{64}")
_SCAFFOLD = re.compile(r"\.(claim|worker|fragment|block|part)-.*|\.(dtype|prepared\.json)|\..+\.(tmp|sha256)")
FIELDS = {  # of a manifest, with their types
    "stage": str,
    "key": str,
    "parameters": dict,
    "inputs": dict,
    "about": dict,
    "counts": dict,
    "seconds": (int, float),
    "files": dict,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Hold what a stage's outcome depends on, and nothing else."""

    stage: str
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # name -> fingerprint
    about: dict[str, Any] = field(default_factory=dict)  # to be read by people; not part of the key

    @property
    def key(self) -> str:
        """Return 16 hex digits that differ wherever the outcome may differ."""
        recipe = {"format": FORMAT, "stage": self.stage, "parameters": self.parameters, "inputs": self.inputs}
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished stage. Raises `ValueError` if there is none, or it is damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise ValueError(f"{folder}: not a finished stage (no manifest.json); run `fuselm run` again") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged; delete {folder} and run again") from None
    if type(manifest.get("format")) is not int or manifest["format"] != FORMAT:
        given = str(manifest.get("format"))[:20]
        raise ValueError(f"{folder}: written in format {given}, this fuselm reads {FORMAT}; run the stage again")
    if wrong := _find_wrong_field(manifest):
        raise ValueError(f"{path}: damaged ({wrong}); delete {folder} and run again")
    return manifest


def _find_wrong_field(manifest: dict[str, Any]) -> str | None:
    """Say which field is missing or of another type than `build_once` writes, if any."""
    for name, kind in FIELDS.items():
        if name not in manifest:
            return f"no field {name}"
        if not isinstance(manifest[name], kind):
            return f"{name} is a {type(manifest[name]).__name__}"
    for name, fingerprint in manifest["inputs"].items():
        if not isinstance(fingerprint, str):
            return f"the input {name!r:.40} is a {type(fingerprint).__name__}"
    for name, sha256 in manifest["files"].items():
        parts = name.split("/")
        if not name.isprintable() or name.startswith("/") or "\\" in name or {"", ".", ".."} & set(parts):
            return f"{name!r:.40} names no file of this folder"
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            return f"no SHA-256 of {name:.40}"
    return None


def read_json(path: Path, *, drop: Path | None = None) -> Any:
    """Return what a JSON file of a stage or a run holds.

    Raises `ValueError` if the file is missing or damaged; it tells the user to delete `drop`, by default the file's
    folder, so that the next run makes it again.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise ValueError(f"{path}: {what}; delete {drop or path.parent} and run again") from None


def is_finished(folder: Path) -> bool:
    """Tell whether a stage is finished: its manifest is written last."""
    return (folder / "manifest.json").is_file()


def measure_partial(folder: Path) -> int:
    """Return the bytes of what an interrupted call left of a stage."""
    if isinstance(folder, RemotePath):
        from fuselm.system.local_copies import locate_copy

        folder = locate_copy(folder)
    partial = folder.with_name(folder.name + ".partial")
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def build_once(
    folder: Path,
    recipe: Recipe,
    build: Callable[[Path], dict[str, Any]],
    *,
    together: bool = False,
    on_wait: Callable[[], object] | None = None,
) -> bool:
    """Fill `folder` by `build(partial folder) -> counts`, unless it is there. Return whether anything was done.

    `build` is called with whatever an interrupted call left in the partial folder, and resumes from it.
    If a run has several processes, only the first builds and the others wait; with `together`, all call `build`, and
    the first does the rest. If another run is working on the folder, `on_wait` is called and this one waits until the
    other has built it, or builds it if the other ends before; without `on_wait`, `ValueError` is raised. Raises
    `OSError`, which names a file or folder, if the disk takes no more.
    """
    if isinstance(folder, RemotePath):
        from fuselm.system import remote_stages

        return remote_stages.build_remotely(folder, recipe, build, together=together, on_wait=on_wait)
    if is_finished(folder):
        return False
    refuse_unfinished(folder)
    partial = folder.with_name(folder.name + ".partial")
    if processes.rank() > 0:
        if together:
            processes.wait_until(lambda: (partial / ".lock").exists() or is_finished(folder))
            was_built = is_built(partial, recipe)  # before the other question, for the folder may be renamed just now
            if not was_built and not is_finished(folder):
                build(partial)
        processes.wait_until(lambda: is_finished(folder))
        return True
    with name_disk_errors(partial), lock_folder(partial, on_wait):
        if is_finished(folder):  # another process did it while this one waited to begin
            shutil.rmtree(partial, ignore_errors=True)
            return False
        if not is_built(partial, recipe):  # else it was cut off while its name was changed
            _build(partial, recipe, build)
        for scaffold in partial.glob(".*"):
            if scaffold.name != ".lock":
                scaffold.unlink()
        os.rename(partial, folder)
        (folder / ".lock").unlink()
        atomic_files.fsync(folder.parent)
    return True


def refuse_unfinished(folder: Path) -> None:
    """Raise `ValueError` if there is a folder of the final name that is not a finished stage."""
    if folder.exists() and not is_finished(folder):
        raise ValueError(f"{folder}: in the way, for it has no manifest.json; move it elsewhere or delete it")


def locate_final(partial: Path) -> Path:
    """Return the folder that a partial folder becomes."""
    return partial.with_name(partial.name.removesuffix(".partial"))


def sweep_scaffolds(folder: Path) -> None:
    """Remove from a finished stage what was only needed while it was made, its lock last."""
    if isinstance(folder, RemotePath):
        folder.remove_files(list(folder.glob(".*")))
        return
    for scaffold in sorted(folder.glob(".*"), key=lambda path: path.name == ".lock"):
        if scaffold.is_file():
            scaffold.unlink(missing_ok=True)


def remove_stale_lock(folder: Path) -> None:
    """Remove what a kill may have left in a finished stage: the lock of who renamed it, and what was to be swept."""
    if isinstance(folder, RemotePath):
        return
    lock = folder / ".lock"
    if lock.exists() and not file_lock.is_held(lock):
        with contextlib.suppress(OSError):  # we may not write there
            for path in folder.glob(".*"):
                if _SCAFFOLD.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            file_lock.remove_stale_lock(lock)


def _build(partial: Path, recipe: Recipe, build: Callable[[Path], dict[str, Any]]) -> None:
    """Fill a partial folder, and write the manifest of what is there."""
    started = time.perf_counter()
    (partial / "manifest.json").unlink(missing_ok=True)
    for leftover in partial.rglob(".*.tmp"):
        leftover.unlink()
    write_manifest(partial, recipe, build(partial), time.perf_counter() - started)


def write_manifest(
    partial: Path,
    recipe: Recipe,
    counts: dict[str, Any],
    seconds: float,
    *,
    parts: list[Mapping[str, Any]] | None = None,
) -> None:
    """Write the manifest of what is in a partial folder, when the disk has all of it."""
    for product in _list_product_files(partial):
        atomic_files.fsync(product)
    manifest = {
        "format": FORMAT,
        "stage": recipe.stage,
        "key": recipe.key,
        "parameters": recipe.parameters,
        "inputs": recipe.inputs,
        "about": recipe.about,
        "counts": counts,
        **({"parts": list(parts)} if parts else {}),
        "seconds": round(seconds, 3),
        "files": {str(p.relative_to(partial)): atomic_files.recall_hash(p) for p in _list_product_files(partial)},
    }
    atomic_files.write_text(partial / "manifest.json", json.dumps(manifest, indent=1))


def is_built(partial: Path, recipe: Recipe) -> bool:
    """Tell whether a partial folder has its manifest, which is written last, and every file of it."""
    try:
        made = json.loads((partial / "manifest.json").read_bytes())
        return made["key"] == recipe.key and all((partial / name).is_file() for name in made["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def reopen_stage(folder: Path) -> None:
    """Let a finished stage be built again from the files it has. If there are several processes, the first does it."""
    if isinstance(folder, RemotePath):
        from fuselm.system import remote_stages

        if processes.rank() == 0:
            remote_stages.reopen_remotely(folder)
    elif processes.rank() == 0:
        partial = folder.with_name(folder.name + ".partial")
        os.rename(folder, partial)
        (partial / "manifest.json").unlink()
    processes.wait_until(lambda: not is_finished(folder))


def _list_product_files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if not p.name.startswith(".") and p != folder / "manifest.json")
    return sorted(p for p in found if isinstance(p, RemotePath) or p.is_file())


@contextlib.contextmanager
def lock_folder(partial: Path, on_wait: Callable[[], object] | None, *, shared: bool = False) -> Iterator[None]:
    """Make and lock a partial folder, alone or `shared` with others.

    Whoever held the lock may have renamed the folder, so it may be made again.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(partial / ".lock", "w")  # noqa: SIM115
        except FileNotFoundError:  # removed just now by another process that had waited
            continue
        with lock:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    raise ValueError(
                        f"{partial}: another fuselm process is working on it; wait for it to end"
                    ) from None
                on_wait()
                fcntl.flock(lock, kind)
            if file_lock.has_name(lock, partial / ".lock"):
                yield
                return
