"""Is a store whole? Every file by the manifest, every page, every row, the index; and of a damaged one, what is left.

Nothing here trusts what it checks: a part is read row group by row group, so that damage costs the documents of one
group, and no index is needed to say which documents are good.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuselm import manifest, store
from fuselm.distributions import check
from fuselm.errors import first_line
from fuselm.progress import Progress
from fuselm.rows import from_table

NAMED = 5  # documents that a line names
MOST_ROUNDED = 0.25  # that rounding moves the sum of a row by; docs/store.md


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with a file; `lost` are documents of it that cannot be used, where it is known which."""

    path: Path
    what: str
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = ", ".join(self.lost[:NAMED]) + (", …" if len(self.lost) > NAMED else "")
        lost = f"; lost: {len(self.lost)} documents ({named})" if self.lost else ""
        return f"{self.path}: {self.what}{lost}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found. `kept` are the documents whose rows are good, as they are on disk."""

    problems: tuple[Problem, ...]
    kept: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the index says that a document is, and what it says of it."""

    document: str
    text: str
    size: int
    tokens: int
    part: int
    group: int
    row: int


def verify(folder: Path, *, progress: Progress) -> Verdict:
    """Raises `ValueError` only if there is no manifest to verify by."""
    made = manifest.read(folder)
    problems = list(_wrong_files(folder, made["files"]))
    index, of_index = _read_index(folder)
    problems += of_index
    parts = sorted({*folder.glob("part-*.parquet"), *(folder / name for name in made["files"] if _is_part(name))})
    progress.start(sum(path.stat().st_size for path in parts if path.is_file()), unit="bytes")
    good: dict[str, Place] = {}
    for path in parts:
        if path.name not in made["files"]:
            continue  # nothing reads it
        if path.is_file():
            problems += _check_part(path, index, good)
            progress.advance(path.stat().st_size)
        else:
            problems.append(Problem(path=path, what="is missing", lost=_expected(path, index)))
    for document, place in (index or {}).items():
        if document in good and good[document] != place:
            problems.append(Problem(path=folder / store.INDEX, what=f"says another thing of document {document}"))
    if index is not None and not any(p.lost for p in problems) and index.keys() != good.keys():
        differ = tuple(sorted(index.keys() ^ good.keys()))
        problems.append(Problem(path=folder / store.INDEX, what="has other documents than the parts", lost=differ))
    lost = tuple(sorted({d for p in problems for d in p.lost} | ((index or {}).keys() - good.keys())))
    kept = tuple(document for document in good if document not in lost)
    if not problems and len(kept) != made["counts"].get("documents"):
        what = f"counts {made['counts'].get('documents')} documents, there are {len(kept)}"
        problems.append(Problem(path=folder / "manifest.json", what=what))
    return Verdict(problems=tuple(problems), kept=kept, lost=lost)


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")


def _wrong_files(folder: Path, files: dict[str, str]) -> Iterator[Problem]:
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            if not _is_part(name):  # a part is missed with its documents
                yield Problem(path=folder / name, what="is missing")
        elif manifest.sha256(folder / name) != sha256:
            yield Problem(path=folder / name, what="checksum differs, it is not the file that was written")
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in files and name != "manifest.json":
            yield Problem(path=path, what="is not in the manifest; nothing reads it, move it away")


def _read_index(folder: Path) -> tuple[dict[str, Place] | None, list[Problem]]:
    path = folder / store.INDEX
    if not path.is_file():
        return None, []
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        if not table.schema.equals(store.INDEX_SCHEMA):
            raise ValueError("other columns than an index has")
    except store.DAMAGED as error:
        return None, [
            Problem(path=path, what=f"not a readable index ({first_line(error)}); the parts tell what it did")
        ]
    rows = [Place(size=row.pop("bytes"), **row) for row in table.to_pylist()]
    problems = []
    if [row.document for row in rows] != sorted({row.document for row in rows}, key=str.encode):
        problems.append(Problem(path=path, what="documents are not in order, each once"))
    return {row.document: row for row in rows}, problems


def _expected(path: Path, index: dict[str, Place] | None, group: int | None = None) -> tuple[str, ...]:
    """The documents that the index has in a part, or in one row group of it."""
    of_part = [place for place in (index or {}).values() if store.part_path(path.parent, place.part) == path]
    return tuple(place.document for place in of_part if group in (None, place.group))


def _check_part(path: Path, index: dict[str, Place] | None, good: dict[str, Place]) -> Iterator[Problem]:
    """Problems of a part; what is good in it is added to `good`."""
    number = int(path.stem.rpartition("-")[2])
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if not file.schema_arrow.equals(store.SCHEMA):
            raise ValueError("other columns than a store has")
    except store.DAMAGED as error:
        what = f"not a readable Parquet file ({first_line(error)})"
        yield Problem(path=path, what=what, lost=_expected(path, index))
        return
    for group in range(file.num_row_groups):
        try:
            table = file.read_row_group(group, use_threads=False)
            table.validate(full=True)
            traces = from_table(table)
        except store.DAMAGED as error:
            lost = _expected(path, index, group)
            yield Problem(path=path, what=f"row group {group} is damaged ({first_line(error)})", lost=lost)
            continue
        for row, trace in enumerate(traces):
            wrong = wrong_row(table, row, trace)
            if wrong is None and trace.document in good:
                wrong = "is there twice"
            if wrong is not None:
                yield Problem(path=path, what=f"document {trace.document}: {wrong}", lost=(trace.document,))
                continue
            good[trace.document] = Place(
                document=trace.document,
                text=trace.text,
                size=trace.size,
                tokens=len(trace.tokens),
                part=number,
                group=group,
                row=row,
            )


def wrong_row(table: pa.Table, row: int, trace: store.Trace) -> str | None:
    """What the row of a document breaks of docs/store.md, if anything."""
    d = trace.distributions
    values = {
        name: table[name][row].values.to_numpy(zero_copy_only=False)
        for name in ("counts", "ids", "logprobs", "tail", "gold")
    }
    with np.errstate(all="ignore"):
        for holds, rule in RULES.items():
            if not rule(values, trace):
                return holds
        try:
            check(d, 1 << 31)
        except ValueError as error:
            return str(error)
    return None


def _rows(values: dict[str, Any]) -> np.ndarray:
    return np.repeat(np.arange(len(values["counts"])), values["counts"])


def _sums(values: dict[str, Any]) -> np.ndarray:
    masses = np.exp(values["logprobs"].astype(np.float64))
    return np.bincount(_rows(values), masses, minlength=len(values["counts"])) + values["tail"]


def _ascending(values: dict[str, Any]) -> bool:
    first = np.zeros(len(values["ids"]) + 1, bool)
    first[np.append(0, np.cumsum(values["counts"]))] = True
    return bool((first[1:-1] | (np.diff(values["ids"]) > 0)).all())


RULES: dict[str, Callable[[dict[str, Any], store.Trace], Any]] = {
    "a row has fewer than no entries": lambda v, t: (v["counts"] >= 0).all(),
    "ids are not ascending, each once in a row": lambda v, t: _ascending(v),
    "an id is below 0": lambda v, t: not len(v["ids"]) or v["ids"].min() >= 0,
    "a log-probability is above 0": lambda v, t: not ((v["logprobs"] > 0).any() or (v["gold"] > 0).any()),
    "a tail is no probability": lambda v, t: ((v["tail"] >= 0) & (v["tail"] <= 1)).all(),
    "an entry was drawn from a tail of 0": lambda v, t: (v["tail"] > 0)[_rows(v)[np.isneginf(v["logprobs"])]].all(),
    "entries and tail do not sum to 1": lambda v, t: (np.abs(_sums(v) - 1) <= MOST_ROUNDED).all(),
    "a row without entries has a tail other than 1, or gold": lambda v, t: ((v["tail"] == 1) & (v["gold"] == 0))[
        v["counts"] == 0
    ].all(),
    "a token is below 0": lambda v, t: (t.tokens >= 0).all(),
    "tokens begin outside the text, or not in order": lambda v, t: (
        not len(t.starts) or (t.starts[0] >= -1 and t.starts[-1] <= t.size and (np.diff(t.starts) >= 0).all())
    ),
    "the cross-entropy is no number": lambda v, t: t.nats >= 0,
    "weights do not fit the tokens": lambda v, t: np.isfinite(t.weights).all(),
}
