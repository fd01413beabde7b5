"""Check that a store is whole, and find what is left of a damaged one.

Every file is compared to the manifest, and every page, every row and the index are checked. Nothing that is being
checked is trusted: a part is read row group by row group, so that damage costs only the documents of one group, and no
index is needed to say which documents are good.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fuselm.stores import index as indexes
from fuselm.stores import parts, rules, trust
from fuselm.stores.rows import SCHEMA, flatten_columns
from fuselm.system import atomic_files, manifest
from fuselm.system.errors import summarize_error
from fuselm.system.progress import Progress

NAMED = 5  # the most documents named in one line


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Describe a problem with a file; `lost` lists the documents in it that cannot be used, if they are known."""

    path: Path
    what: str
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = ", ".join(self.lost[:NAMED]) + (", …" if len(self.lost) > NAMED else "")
        lost = f"; lost: {len(self.lost)} documents ({named})" if self.lost else ""
        return f"{self.path}: {self.what}{lost}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """List the problems of a store, the documents `kept`, whose rows are good on disk, and the documents `lost`."""

    problems: tuple[Problem, ...]
    kept: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Locate a document as the index does, with the facts that the index holds about it."""

    document: str
    text: str
    size: int
    tokens: int
    part: int
    group: int
    row: int


def verify_store(folder: Path, *, progress: Progress, vocabulary_size: int | None = None) -> Verdict:
    """Check all of a store and return the verdict.

    `vocabulary_size` is the number of ids of the model that the store's ids belong to, if it is known. A store without
    a problem is remembered as sound. Raises `ValueError` only if the folder has no manifest of a store to verify by.
    """
    made = manifest.read(folder)
    try:
        expected = rules.read_expectations(made, vocabulary_size)
    except ValueError as error:
        raise ValueError(f"{folder}/manifest.json: damaged ({error})") from None
    problems = list(_find_file_problems(folder, made["files"]))
    index, of_index = _read_index(folder, made)
    problems += of_index
    named = {folder / name for name in made["files"] if parts.is_part(name)}
    present = sorted({*folder.glob("part-*.parquet"), *named})
    progress.start(sum(path.stat().st_size for path in present if path.is_file()), unit="bytes")
    good: dict[str, Place] = {}
    largest, entries = -1, 0
    for path in present:
        if path.name not in made["files"] or not parts.is_part(path.name):
            continue  # nothing reads this file
        if path.is_file():
            part = _check_part(path, index, good, expected)
            problems += part.problems
            largest, entries = max(largest, part.largest), entries + part.entries
            progress.advance(path.stat().st_size)
        else:
            problems.append(Problem(path=path, what="is missing", lost=_list_expected_documents(path, index)))
    for document, place in (index or {}).items():
        if document in good and good[document] != place:
            problems.append(Problem(path=folder / indexes.INDEX, what=f"says another thing of document {document}"))
    if index is not None and not any(p.lost for p in problems) and index.keys() != good.keys():
        differ = tuple(sorted(index.keys() ^ good.keys()))
        problems.append(Problem(path=folder / indexes.INDEX, what="has other documents than the parts", lost=differ))
    lost = tuple(sorted({d for p in problems for d in p.lost} | ((index or {}).keys() - good.keys())))
    kept = tuple(document for document in good if document not in lost)
    if not problems:
        counted = {"documents": len(kept), "tokens": sum(place.tokens for place in good.values()), "entries": entries}
        problems += _find_manifest_problems(folder, made, counted)
    if not problems:
        trust.remember_store(folder, made, largest)
    return Verdict(problems=tuple(problems), kept=kept, lost=lost)


def _find_manifest_problems(folder: Path, made: Mapping[str, Any], counted: Mapping[str, int]) -> Iterator[Problem]:
    path = folder / "manifest.json"
    for name, there in counted.items():
        if made["counts"][name] != there:
            yield Problem(path=path, what=f"counts {made['counts'][name]} {name}, there are {there}")
    recipe = manifest.Recipe(stage=made["stage"], parameters=made["parameters"], inputs=made["inputs"])
    if recipe.key != made["key"]:
        yield Problem(path=path, what="the key is not that of its stage, parameters and inputs")


def _find_file_problems(folder: Path, files: dict[str, str]) -> Iterator[Problem]:
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            if not parts.is_part(name):  # a part is missed with its documents
                yield Problem(path=folder / name, what="is missing")
        elif atomic_files.hash_file(folder / name) != sha256:
            yield Problem(path=folder / name, what="checksum differs, it is not the file that was written")
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in files and name not in ("manifest.json", ".lock"):  # left by a killed process
            yield Problem(path=path, what="is not in the manifest; nothing reads it, move it away")


def _read_index(folder: Path, made: Mapping[str, Any]) -> tuple[dict[str, Place] | None, list[Problem]]:
    path = folder / indexes.INDEX
    if not path.is_file():
        return None, []
    try:
        table = indexes.read_index(folder)
    except ValueError as error:
        what = str(error).removeprefix(f"{path}: ")
        return None, [Problem(path=path, what=f"{what}; the parts tell what it did")]
    wrong = indexes.find_index_fault(table, made)
    places = [Place(size=row.pop("bytes"), **row) for row in table.to_pylist()]
    return {place.document: place for place in places}, [Problem(path=path, what=wrong)] if wrong else []


def _list_expected_documents(path: Path, index: dict[str, Place] | None, group: int | None = None) -> tuple[str, ...]:
    """Return the documents that the index has in a part, or in one row group of it."""
    of_part = [place for place in (index or {}).values() if place.part == parts.read_part_number(path)]
    return tuple(place.document for place in of_part if group in (None, place.group))


@dataclass(slots=True, kw_only=True)
class _PartVerdict:
    """Collect what was found in a part."""

    problems: list[Problem] = field(default_factory=list)
    largest: int = -1
    entries: int = 0


def _check_part(
    path: Path, index: dict[str, Place] | None, good: dict[str, Place], expected: rules.Expectations
) -> _PartVerdict:
    """Check a part, and add its good documents to `good`."""
    result, number = _PartVerdict(), parts.read_part_number(path)
    try:
        file = parts.open_parquet(path, SCHEMA)
    except ValueError as error:
        what = str(error).removeprefix(f"{path}: ")
        result.problems.append(Problem(path=path, what=what, lost=_list_expected_documents(path, index)))
        return result
    for group in range(file.num_row_groups):
        try:
            table = parts.read_group(file, group)
            table.validate(full=True)
            columns = flatten_columns(table)
            broken = rules.find_broken_rules(columns, expected)
            names, texts = columns.documents.to_pylist(), columns.texts.to_pylist()
        except parts.DAMAGED as error:
            lost = _list_expected_documents(path, index, group)
            what = f"row group {group} is damaged ({summarize_error(error)})"
            result.problems.append(Problem(path=path, what=what, lost=lost))
            continue
        result.largest = max(result.largest, columns.largest_id)
        result.entries += len(columns.flat["ids"])
        tokens = np.diff(columns.edges["tokens"]).tolist()
        for row, (name, text, size) in enumerate(zip(names, texts, columns.flat["bytes"].tolist(), strict=True)):
            wrong = broken.get(row) or ("is there twice" if name in good else None)
            if wrong is not None:
                result.problems.append(Problem(path=path, what=f"document {name}: {wrong}", lost=(name,)))
                continue
            place = {"tokens": tokens[row], "part": number, "group": group, "row": row}
            good[name] = Place(document=name, text=text, size=size, **place)
    return result
