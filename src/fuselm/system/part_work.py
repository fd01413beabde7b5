"""Make a folder part by part, in as many processes as call `make_parts` on it, each part once.

A part is done when its fragment is there: a hidden JSON file with the part's file, its SHA-256, its counts and what is
to be summed. The last one to need it, `finish`, is claimed as a part is. So the folder's bytes do not depend on who
made what, and whoever is killed costs no more than the parts that it was making.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.system import atomic_files, manifest, processes
from fuselm.system.background import Background
from fuselm.system.claims import MOST_SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LOOKS, Claims, open_claims
from fuselm.system.disk_errors import name_disk_errors
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.remote_paths import RemotePath

FRAGMENT, PREPARED = ".fragment-", ".prepared.json"
NOT_KEPT = ("part", "sums", "skipped")  # of a fragment, in the manifest
SECONDS_BETWEEN_LISTINGS = 1.0  # of the folder, to see what others have done

Fragment = dict[str, Any]
Complete = Callable[[], Fragment]


def build_by_parts(
    folder: Path,
    recipe: Recipe,
    build: Callable[[Path], dict | None],
    *,
    on_wait: Callable[[], object] | None = None,
) -> bool:
    """Fill `folder` as `manifest.build_once` does, together with all processes that call this at the same time.

    `build` goes through `make_parts`, and returns the counts in the process that finished, or None. The manifest has
    the fragments of all parts under `parts`.
    """
    if manifest.is_finished(folder):
        return False
    if isinstance(folder, RemotePath):
        _build_in_place(folder, recipe, build)
        return True
    manifest.refuse_unfinished(folder)
    partial, began = folder.with_name(folder.name + ".partial"), time.perf_counter()
    with name_disk_errors(partial), manifest.lock_folder(partial, on_wait, shared=True), open_claims(partial) as claims:
        if manifest.is_finished(folder):
            shutil.rmtree(partial, ignore_errors=True)
            return False
        if not manifest.is_built(partial, recipe):
            try:
                counts = build(partial)
            except OSError:
                if not manifest.is_finished(folder):
                    raise
                counts = None  # others thought that this process was dead, and finished
            if counts is None:
                return True
            seconds = time.perf_counter() - began
            manifest.write_manifest(partial, recipe, counts, seconds, parts=list(_list_fragments(partial)))
        elif not claims.wait_for("finish", lambda: manifest.is_finished(folder)):
            return True
        os.rename(partial, folder)  # before the claims go, so that nobody claims again what is done
        manifest.sweep_scaffolds(folder)
        atomic_files.fsync(folder.parent)
    return True


def _build_in_place(folder: RemotePath, recipe: Recipe, build: Callable[[Path], dict | None]) -> None:
    """Fill a remote folder under its own name, because nothing can be renamed there; its manifest makes it finished."""
    began = time.perf_counter()
    with open_claims(folder):
        try:
            counts = build(folder)
        except OSError:
            if not manifest.is_finished(folder):
                raise
            counts = None  # others finished, and swept what this process was about to read
        if counts is not None:
            seconds = time.perf_counter() - began
            manifest.write_manifest(folder, recipe, counts, seconds, parts=list(_list_fragments(folder)))
    if manifest.is_finished(folder):
        manifest.sweep_scaffolds(folder)


def make_parts(
    out: Path,
    sizes: Sequence[int],
    make_part: Callable[[int], Complete],
    finish: Callable[[list[Fragment]], dict],
    *,
    progress: Progress,
    unit: str,
) -> dict | None:
    """Make the parts of `out` that nobody else makes; return the counts of `finish`, or None if another process did it.

    `make_part(n)` makes part n and counts what it does in `progress`; the function that it returns does the rest, in a
    thread, while the next part is begun, and returns the part's fragment, with its file's name under `file`, if it has
    one. `finish` gets the fragments in order and is called in one process only, when all parts are there. `sizes` are
    those of the parts, in `unit`.
    """
    parts, folder = _Parts(out, sizes, progress), manifest.locate_final(out)
    with open_claims(out) as claims:
        parts.drop_damaged()
        progress.start(sum(sizes), unit=unit, done=parts.list_done())
        with Background(parts.commit, ahead=1, drop=_end_making) as background:
            while (number := parts.claim_next(claims)) is not None:
                background.put((number, make_part(number)))
        while (number := parts.wait_for_next(claims, folder)) is not None:
            parts.commit((number, make_part(number)))
        if claims.wait_for("finish", lambda: manifest.is_finished(folder)):
            return finish(parts.read_fragments())
    return None


def _end_making(made: tuple[int, Complete]) -> None:
    """End the writing of a part that is not committed, because an earlier one failed; it is resumed later."""
    with contextlib.suppress(Exception):
        made[1]()


def prepare_once(out: Path, make: Callable[[], Any]) -> Any:
    """Return what all parts of `out` need, as JSON has it; one process makes it for all."""
    path = out / PREPARED
    with open_claims(out) as claims:
        if claims.wait_for("prepared", path.is_file):
            atomic_files.write_text(path, json.dumps(make()))
        return json.loads(path.read_bytes())


def split_windows(sizes: Sequence[int] | Int[ndarray, "documents"], most: int) -> list[slice]:
    """Split documents, in their order, into windows of about `most` of what `sizes` count.

    A window ends with the document that fills it.
    """
    sums, windows, begin = np.cumsum(np.asarray(sizes, np.int64)), [], 0
    while begin < len(sums):
        before = int(sums[begin - 1]) if begin else 0
        end = min(max(int(np.searchsorted(sums, before + most)), begin) + 1, len(sums))
        windows.append(slice(begin, end))
        begin = end
    return windows


def list_done(out: Path, count: int) -> set[int]:
    """Return which of the first `count` parts of a folder are done."""
    names = [path.name for path in out.glob(f"{FRAGMENT}*.json")]
    return {number for name in names if (number := int(name[len(FRAGMENT) : -len(".json")])) < count}


class _Parts:
    """Know which parts of a folder are done."""

    def __init__(self, out: Path, sizes: Sequence[int], progress: Progress):
        self._out, self._sizes, self._progress = out, [int(size) for size in sizes], progress
        first = processes.worker_number() * len(sizes) // processes.worker_count()  # so that workers seldom meet
        self._missing = dict.fromkeys([*range(first, len(sizes)), *range(first)])
        self._listed = 0.0
        self._final = manifest.locate_final(out)

    def drop_damaged(self) -> None:
        """Remove the fragments of files that are not what was written, so that they are made again."""
        if processes.worker_number() > 0:  # the first looks
            return
        for number in list_done(self._out, len(self._sizes)):
            fragment = self._read(number)
            name = None if fragment is None else fragment.get("file")
            if fragment is None or (name is not None and not _has_hash(self._out / name, fragment["sha256"])):
                self._progress.note(f"{self._out / (name or _name(number))} is damaged; it is made again")
                if name is not None:
                    (self._out / name).unlink(missing_ok=True)
                self._locate(number).unlink(missing_ok=True)

    def list_done(self) -> int:
        """Leave out what is done, and return its size."""
        self._listed = time.monotonic()
        done = list_done(self._out, len(self._sizes)) & self._missing.keys()
        for number in done:
            del self._missing[number]
        return sum(self._sizes[number] for number in done)

    def claim_next(self, claims: Claims) -> int | None:
        """Return a part that is this process's now; None if others make or made all that are left."""
        for number in list(self._missing):
            if time.monotonic() - self._listed > SECONDS_BETWEEN_LISTINGS:
                self._count_others()
            if number in self._missing and self._take(claims, number):
                return number
        return None

    def wait_for_next(self, claims: Claims, final: Path) -> int | None:
        """Wait until all parts are there, or return one whose maker is dead."""
        pause = SECONDS_BETWEEN_LOOKS
        while True:
            self._count_others()
            if not self._missing or manifest.is_finished(final):
                return None
            for number in list(self._missing):
                if self._take(claims, number):
                    return number
            time.sleep(pause)
            pause = min(pause * 1.5, MOST_SECONDS_BETWEEN_LOOKS)

    def commit(self, made: tuple[int, Complete]) -> None:
        """Complete a part, and write its fragment, which makes it done."""
        number, complete = made
        fragment = complete()
        if (name := fragment.get("file")) is not None:
            fragment = {"file": name, "sha256": atomic_files.recall_hash(self._out / name)} | fragment
        atomic_files.write_text(self._locate(number), json.dumps({"part": number} | fragment))

    def read_fragments(self) -> list[Fragment]:
        """Return the fragments of all parts in order."""
        found = [self._read(number) for number in range(len(self._sizes))]
        assert None not in found
        return [fragment for fragment in found if fragment is not None]

    def _take(self, claims: Claims, number: int) -> bool:
        if not claims.take(_name(number)):
            return False
        if self._locate(number).exists() or manifest.is_finished(self._final):  # its maker ended between the two
            return False
        del self._missing[number]
        return True

    def _count_others(self) -> None:
        if done := self.list_done():
            self._progress.advance(done)

    def _read(self, number: int) -> Fragment | None:
        with contextlib.suppress(OSError, ValueError):
            fragment = json.loads(self._locate(number).read_bytes())
            return fragment if isinstance(fragment, dict) and fragment.get("part") == number else None
        return None

    def _locate(self, number: int) -> Path:
        return self._out / f"{FRAGMENT}{number:05d}.json"


def _list_fragments(out: Path) -> Iterator[Mapping[str, Any]]:
    """Yield what the manifest keeps of the fragments in a folder, in order; none if it was not made by parts."""
    for path in sorted(out.glob(f"{FRAGMENT}*.json")):
        fragment = json.loads(path.read_bytes())
        if "file" in fragment:
            yield {name: value for name, value in fragment.items() if name not in NOT_KEPT}


def _has_hash(path: Path, sha256: str) -> bool:
    if isinstance(path, RemotePath):  # object stores check what they are sent, and take it whole
        return path.is_file()
    return path.is_file() and atomic_files.hash_file(path) == sha256


def _name(number: int) -> str:
    return f"part-{number:05d}"
