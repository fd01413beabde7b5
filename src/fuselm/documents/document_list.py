"""Read documents from the parts on disk when they are asked for, however many there are.

A `DocumentList` is a sequence of documents that holds no text. It knows where each document begins, and a few numbers
about it; docs/how-to/large-corpora.md says how much memory that is.
"""

import functools
import itertools
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, overload

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from fuselm.documents.document import SPLITS, Document, parse_line
from fuselm.documents.document_writing import INDEX, ONE_PART, IndexBuilder
from fuselm.system import local_copies

if TYPE_CHECKING:
    import pyarrow

BLOCK = 256  # documents that are read together when a list is iterated
FULL = 0.5  # of the bytes from the first to the last document of a block, so many must be wanted to read them at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Describe a file of documents."""

    path: Path
    rows: int
    size: int  # bytes


class DocumentFolder:
    """Hold the index of a folder of documents, and its open files. Raises `ValueError` if the folder is damaged."""

    def __init__(self, folder: Path):
        self.path = folder
        folder = local_copies.fetch_folder(folder)
        index = folder / INDEX
        table = _open_index(folder) if index.is_file() else _scan_documents(folder)
        described = json.loads((table.schema.metadata or {}).get(b"documents", b"{}"))
        try:
            self.domains: list[str] = described["domains"]
            self.sha256: str = described["sha256"]
            self.parts = [
                Part(path=folder / part["name"], rows=part["rows"], size=part["bytes"]) for part in described["parts"]
            ]
        except (LookupError, TypeError):
            _refuse(index, "damaged")
        self.table = table
        self.bounds = np.cumsum([0, *(part.rows for part in self.parts)])
        self.size = table.num_rows
        for part in self.parts:
            if not part.path.is_file():
                _refuse(part.path, "missing")
            if part.path.stat().st_size != part.size:
                _refuse(part.path, "damaged")
        if self.bounds[-1] != self.size:
            _refuse(index, "damaged")
        self._handles: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._handles)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy in another process open the folder itself."""
        return open_folder, (self.path,)

    def column(self, name: str) -> ndarray:
        """Return a column of numbers, without a copy if it is one piece."""
        return self.table[name].combine_chunks().to_numpy() if self.size else np.zeros(0, np.int32)

    @functools.cached_property
    def offsets(self) -> Int[ndarray, "documents"]:
        """Return the byte of its part at which each document begins."""
        return self.column("offset")

    def read(self, rows: Sequence[int]) -> Iterator[Document]:
        """Yield the documents of ascending rows, which are few."""
        for number, group in itertools.groupby(rows, lambda row: int(np.searchsorted(self.bounds, row, "right")) - 1):
            part, own = self.parts[number], list(group)
            begins = self.offsets[own].tolist()
            ends = [self._find_end(row, number) for row in own]
            wanted = sum(ends) - sum(begins)
            if wanted >= FULL * (ends[-1] - begins[0]):
                data = self._read_bytes(number, begins[0], ends[-1])
                lines = [data[begin - begins[0] : end - begins[0]] for begin, end in zip(begins, ends, strict=True)]
            else:
                lines = [self._read_bytes(number, begin, end) for begin, end in zip(begins, ends, strict=True)]
            for line in lines:
                try:
                    yield parse_line(line)
                except (ValueError, TypeError, KeyError):
                    _refuse(part.path, "damaged")

    def _find_end(self, row: int, part: int) -> int:
        return self.parts[part].size if row + 1 == self.bounds[part + 1] else int(self.offsets[row + 1])

    def _read_bytes(self, part: int, begin: int, end: int) -> bytes:
        """Read from a file that stays open, at a place that other threads and processes do not share."""
        if part not in self._handles:
            self._handles[part] = os.open(self.parts[part].path, os.O_RDONLY)
        return os.pread(self._handles[part], end - begin, begin)


class DocumentList(Sequence[Document]):
    """Hold the documents of one or several folders, or some of them, and read each when it is asked for.

    Slices, selections and sums are lists of this kind, and read nothing. It equals any sequence of the same documents.
    """

    def __init__(self, folders: Sequence[DocumentFolder], rows: range | Int[ndarray, "documents"] | None = None):
        self._folders = list(folders)
        self._bounds = np.cumsum([0, *(folder.size for folder in folders)])
        self._rows = range(int(self._bounds[-1])) if rows is None else rows

    def __repr__(self) -> str:
        return f"DocumentList({len(self):,} documents of {', '.join(str(folder.path) for folder in self._folders)})"

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> "DocumentList": ...

    def __getitem__(self, index: int | slice) -> "Document | DocumentList":
        if isinstance(index, slice):
            return DocumentList(self._folders, self._rows[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index}: there are {len(self)}")
        return next(self._read([int(self._rows[index])]))

    def __iter__(self) -> Iterator[Document]:
        for begin in range(0, len(self), BLOCK):
            rows = self._rows[begin : begin + BLOCK]
            yield from self._read(list(rows) if isinstance(rows, range) else rows.tolist())

    def __add__(self, other: "DocumentList") -> "DocumentList":
        if not isinstance(other, DocumentList):
            return NotImplemented
        if not len(other) or not len(self):
            return self if len(self) else other
        offset = int(self._bounds[-1])
        if _is_whole(self._rows, offset) and _is_whole(other._rows, int(other._bounds[-1])):
            return DocumentList([*self._folders, *other._folders])
        total = offset + int(other._bounds[-1])
        kind = _choose_kind(total)
        rows = np.concatenate([np.asarray(self._rows, kind), np.asarray(other._rows, kind) + kind(offset)])
        return DocumentList([*self._folders, *other._folders], rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(own == of for own, of in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def select(self, split: str | None = None, *, domain: str | None = None) -> "DocumentList":
        """Return the documents of one split, of one domain, or both."""
        mask = np.ones(len(self), bool)
        if split is not None:
            mask &= self._gather("split") == SPLITS.index(split)
        if domain is not None:
            names = self.domain_names
            mask &= self.domain_codes == (names.index(domain) if domain in names else -1)
        return self.take(mask)

    def take(self, which: Bool[ndarray, "documents"] | Int[ndarray, "chosen"]) -> "DocumentList":
        """Return the documents that a mask is set for, or those with the given numbers."""
        numbers = np.flatnonzero(which) if which.dtype == bool else which
        if len(numbers) == len(self) and np.array_equal(numbers, np.arange(len(self))):
            return self
        if isinstance(self._rows, ndarray):
            return DocumentList(self._folders, self._rows[numbers])
        rows = numbers * self._rows.step + self._rows.start
        return DocumentList(self._folders, rows.astype(_choose_kind(int(self._bounds[-1]))))

    @property
    def ids(self) -> "pyarrow.ChunkedArray":
        """Return the documents' ids."""
        import pyarrow as pa

        return self._take_rows(pa.chunked_array([c for f in self._folders for c in f.table["id"].chunks], pa.string()))

    @functools.cached_property
    def domain_names(self) -> list[str]:
        """Return the domains of the folders, in the order of their codes."""
        return list(dict.fromkeys(name for folder in self._folders for name in folder.domains))

    @property
    def domain_codes(self) -> Int[ndarray, "documents"]:
        """Return the number in `domain_names` of each document's domain."""
        numbers = {name: n for n, name in enumerate(self.domain_names)}
        maps = [np.array([numbers[name] for name in folder.domains], np.int32) for folder in self._folders]
        return self._cut([of[folder.column("domain")] for of, folder in zip(maps, self._folders, strict=True)])

    @property
    def splits(self) -> Int[ndarray, "documents"]:
        """Return the number in `SPLITS` of each document's split."""
        return self._gather("split")

    @property
    def sizes(self) -> Int[ndarray, "documents"]:
        """Return the bytes of each text, or of a conversation's responses."""
        return self._gather("size")

    @property
    def is_dialogue(self) -> Bool[ndarray, "documents"]:
        """Flag the conversations."""
        return self._gather("is_dialogue") != 0

    def token_counts(self, reader: str) -> Int[ndarray, "documents"] | None:
        """Return the tokens of each document for a reader, as `Vocabulary.count_tokens` counts them.

        None if they were not counted, as in folders that an earlier version wrote.
        """
        name = f"tokens {reader}"
        if any(name not in folder.table.column_names for folder in self._folders):
            return None
        return self._gather(name)

    def _gather(self, name: str) -> ndarray:
        return self._cut([folder.column(name) for folder in self._folders])

    def _cut(self, columns: Sequence[ndarray]) -> ndarray:
        whole = columns[0] if len(columns) == 1 else np.concatenate(columns or [np.zeros(0, np.int32)])
        rows = self._rows
        is_slice = isinstance(rows, range) and rows.step > 0
        return whole[rows.start : rows.stop : rows.step] if is_slice else whole[np.asarray(rows, np.int64)]

    def _take_rows(self, column: "pyarrow.ChunkedArray") -> "pyarrow.ChunkedArray":
        rows = self._rows
        if isinstance(rows, range) and rows.step == 1:
            return column.slice(rows.start, len(rows))
        return column.take(np.asarray(rows, np.int64))

    def _read(self, rows: Sequence[int]) -> Iterator[Document]:
        """Yield the documents of a few rows, whose numbers count through all folders."""
        stretch: list[int] = []
        at = -1
        for row in rows:
            number = int(np.searchsorted(self._bounds, row, "right")) - 1
            own = row - int(self._bounds[number])
            if stretch and (number != at or own < stretch[-1]):
                yield from self._folders[at].read(stretch)
                stretch = []
            at = number
            stretch.append(own)
        if stretch:
            yield from self._folders[at].read(stretch)


def read_documents(folder: Path, split: str | None = None) -> DocumentList:
    """Return the documents of a folder, either of one split or all. Raises `ValueError` if it is damaged."""
    documents = DocumentList([open_folder(folder)])
    return documents if split is None else documents.select(split)


def identify_documents(folder: Path, files: "dict[str, str]") -> str | None:
    """Return the SHA-256 of all parts of a folder, joined; `files` are those of its manifest.

    None if the folder has no documents.
    """
    if ONE_PART in files:
        return files[ONE_PART]
    if INDEX not in files:
        return None
    return open_folder(folder).sha256


def open_folder(folder: Path) -> DocumentFolder:
    """Open a folder of documents."""
    return DocumentFolder(folder)


def _open_index(folder: Path) -> "pyarrow.Table":
    """Return the index of a folder, which is mapped to memory and read when it is needed."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(folder / INDEX)) as file:
            return pa.ipc.open_file(file).read_all()
    except (pa.ArrowException, OSError):
        _refuse(folder / INDEX, "damaged")


def _scan_documents(folder: Path) -> "pyarrow.Table":
    """Make the index of a folder that has none, as earlier versions wrote it, by reading all documents once."""
    path = folder / ONE_PART
    builder, offset, rows = IndexBuilder(), 0, 0
    try:
        with path.open("rb") as file:
            for line in file:
                builder.add(parse_line(line), offset)
                offset, rows = offset + len(line), rows + 1
    except (ValueError, TypeError, KeyError):
        _refuse(path, "damaged")
    except FileNotFoundError:
        _refuse(path, "missing")
    return builder.build([(ONE_PART, rows, offset)], "")


def _refuse(path: Path, what: str) -> NoReturn:
    raise ValueError(f"{path}: {what}; delete {path.parent} and run again") from None


def _close_all(handles: dict[int, int]) -> None:
    for handle in handles.values():
        os.close(handle)


def _is_whole(rows: "range | ndarray", count: int) -> bool:
    return isinstance(rows, range) and rows == range(count)


def _choose_kind(count: int) -> type:
    return np.int32 if count < 1 << 31 else np.int64
