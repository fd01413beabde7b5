"""Traces on disk: what capture, align and fuse write, and all later stages read. docs/store.md has every field.

A store is a folder of Parquet files, a row a document, their index, and the manifest of the stage that wrote it. A part
file is written whole or not at all, so an interrupted stage goes on after its last part.
"""

import bisect
import functools
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fuselm import manifest
from fuselm.errors import first_line
from fuselm.rows import FLAT, SCHEMA, FlatRows, Rows, Trace, joined, to_table

GROUP_TOKENS = 4096  # of a row group, which is read as a whole: few enough for one document, enough to compress
PART_TOKENS = 1 << 19  # of a part where nothing else decides
OPEN_FILES = 64
BUFFER_BYTES = 1 << 15  # of a file that is read; without, small columns cost a call each
NAMES_STEP = 32  # of the names in the index, one of so many is at hand
INDEX = "index.parquet"
DAMAGED = (pa.ArrowException, OSError, ValueError)  # what reading a damaged file may raise

INDEX_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("document", "text")]
    + [pa.field(name, pa.int32(), nullable=False) for name in ("bytes", "tokens", "part", "group", "row")]
)
# The smallest of Parquet's encodings for each column, measured by benchmarks/store.py on real captures.
ENCODING = {
    "ids": "PLAIN",
    "tokens": "PLAIN",
    "starts": "DELTA_BINARY_PACKED",
    "gold": "BYTE_STREAM_SPLIT",
    "counts": "BYTE_STREAM_SPLIT",
}
WRITER = {
    "compression": "zstd",
    "compression_level": 9,
    "use_dictionary": ["document", "text"] + [f"{name}.list.element" for name in ("tail", "logprobs", "weights")],
    "column_encoding": {f"{name}.list.element": encoding for name, encoding in ENCODING.items()},
    "write_statistics": False,
    "write_page_checksum": True,
}


def text_fingerprint(text: str) -> str:
    """16 hex digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- writing


def write_part(folder: Path, number: int, traces: Iterable[Trace]) -> None:
    """Write `part-<number>.parquet`, whole or not at all."""
    write_tables(part_path(folder, number), [to_table(traces)])


def write_parts(folder: Path, traces: Iterable[Trace]) -> dict[str, int]:
    """Write all of `traces` to parts and `finish`, never holding more than a row group of them."""
    traces = iter(traces)
    for number in itertools.count():
        if (first := next(traces, None)) is None:
            return finish(folder)
        part = _up_to(PART_TOKENS, itertools.chain([first], traces))
        write_tables(part_path(folder, number), _tables(part))


def _tables(traces: Iterable[Trace]) -> Iterator[pa.Table]:
    traces = iter(traces)
    while group := list(_up_to(GROUP_TOKENS, traces)):
        yield to_table(group)


def _up_to(tokens: int, traces: Iterator[Trace]) -> Iterator[Trace]:
    """The next traces, until there are so many tokens."""
    taken = 0
    while taken < tokens and (trace := next(traces, None)) is not None:
        taken += max(len(trace.tokens), 1)
        yield trace


def write_tables(path: Path, tables: Iterable[pa.Table], *, seal: bool = False) -> None:
    """Write rows as they are on disk, in groups of `GROUP_TOKENS`, whole or not at all; `seal` as in manifest.py."""

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, SCHEMA, **WRITER) as writer:
            for table in tables:
                for group in _groups(table):
                    writer.write_table(group, row_group_size=max(len(group), 1))

    manifest.write_bytes(path, write, seal=seal)


def _groups(table: pa.Table) -> Iterator[pa.Table]:
    ends = np.cumsum(np.maximum(pc.list_value_length(table["tokens"]).to_numpy(), 1))
    begin = 0
    while begin < len(table):
        before = ends[begin - 1] if begin else 0
        end = int(np.searchsorted(ends, before + GROUP_TOKENS)) + 1
        yield table.slice(begin, end - begin)
        begin = end


def finish(folder: Path) -> dict[str, int]:
    """Write the index of the parts in `folder`; return how many documents, tokens and entries there are."""
    columns: list[pa.Table] = []
    entries = 0
    for number, path in enumerate(sorted(folder.glob("part-*.parquet"))):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=["document", "text", "bytes", "counts"])
            entries += pc.sum(pc.list_flatten(rows["counts"])).as_py() or 0
            place = {
                "tokens": pc.list_value_length(rows["counts"]).combine_chunks(),
                "part": pa.array(np.full(len(rows), number, np.int32)),
                "group": pa.array(np.full(len(rows), group, np.int32)),
                "row": pa.array(np.arange(len(rows), dtype=np.int32)),
            }
            known = {name: rows[name].combine_chunks() for name in ("document", "text", "bytes")}
            columns.append(pa.table(known | place, schema=INDEX_SCHEMA))
    index = pa.concat_tables([INDEX_SCHEMA.empty_table(), *columns]).sort_by("document")
    names = index["document"]
    twice = pc.index(pc.equal(names.slice(1), names.slice(0, max(len(names) - 1, 0))), True).as_py()
    if twice >= 0:
        raise ValueError(f"{folder}: document {names[twice].as_py()} is there twice; take it from one store only")
    manifest.write_bytes(
        folder / INDEX,
        lambda path: pq.write_table(index, path, compression="zstd", write_statistics=False, write_page_checksum=True),
    )
    return {"documents": len(index), "tokens": pc.sum(index["tokens"]).as_py() or 0, "entries": entries}


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


# ---- reading


class Store:
    """A finished store, read by document or from its beginning to its end.

    In memory are its index, and the row group that a document was last read from; or the last row groups with up to
    `keep_tokens` in all, for documents that are read in another order than they are on disk.

    What was drawn from a row's tail shares its mass; without `draws`, it is left out, and the mass stays in the tail.
    Raises `ValueError` if the folder is no store or the store is damaged.
    """

    def __init__(self, folder: Path, *, draws: bool = True, keep_tokens: int = 0):
        self.folder = folder
        self._draws = draws
        self.manifest = manifest.read(folder)
        try:
            index = pq.read_table(folder / INDEX, page_checksum_verification=True, use_threads=False)
            if not index.schema.equals(INDEX_SCHEMA):
                raise ValueError("other columns than an index has")
        except DAMAGED as error:
            raise ValueError(self._damaged(folder / INDEX, "not a readable Parquet file", error)) from None
        self.index = index.select(["document", "text", "bytes", "tokens"])
        self._names = joined(index, "document")
        self._some_names = self._names.take(pa.array(np.arange(0, len(index), NAMES_STEP))).to_pylist()
        self._rows = index["row"].to_numpy()
        self._groups = index["part"].to_numpy().astype(np.int64) << 32 | index["group"].to_numpy()
        self._order = np.lexsort((self._rows, self._groups)).astype(np.int32)  # as they are on disk
        self._groups_in_order = self._groups[self._order]
        self._file = functools.lru_cache(OPEN_FILES)(self._open)
        self._keep_tokens = keep_tokens
        self._kept: OrderedDict[tuple[int, Sequence[str] | None], Rows] = OrderedDict()  # least recently read first
        self._kept_tokens = 0

    @property
    def documents(self) -> list[str]:
        """In the order they are read fastest in."""
        return self._names.take(pa.array(self._order)).to_pylist()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, document: str) -> bool:
        return self._find(document) is not None

    def __iter__(self) -> Iterator[Trace]:
        for group in np.unique(self._groups).tolist():
            yield from self._unpacked(group)

    def tables(self, documents: Collection[str] | None = None) -> Iterator[pa.Table]:
        """Rows (None: all) as they are on disk, by row group: to be written elsewhere with nothing rounded twice."""
        chosen = None if documents is None else pa.array(sorted(documents), pa.string())
        wanted = ... if chosen is None else pc.is_in(self._names, chosen).to_numpy(zero_copy_only=False)
        for group in np.unique(self._groups[wanted]).tolist():
            table = self._table(group)
            yield table if chosen is None else table.filter(pc.is_in(table["document"], chosen))

    def read(self, document: str) -> Trace:
        """Raises `KeyError` for a document that isn't there, `ValueError` for one that is damaged."""
        return self.read_all([document])[0]

    def read_all(self, documents: Sequence[str]) -> list[Trace]:
        """Several at a time, which costs less for each. Raises as `read` does."""
        found = list(map(self._place, documents))
        traces: dict[int, Trace] = {}
        for at in sorted(found, key=lambda at: (self._groups[at], self._rows[at])):
            traces[at] = self._group(int(self._groups[at])).trace(int(self._rows[at]))
        return [traces[at] for at in found]

    def read_flat(self, document: str) -> FlatRows:
        """What training takes of a document, in three quarters of the time. Raises as `read` does."""
        at = self._place(document)
        return self._group(int(self._groups[at]), FLAT).flat(int(self._rows[at]))

    def expect(self, wanted: Mapping[str, str], texts: Mapping[str, str], *, where: str) -> None:
        """Raises `ValueError` unless the store was made of these inputs (name to fingerprint) and holds these texts
        (document to text), but for documents that the capture had to skip.
        """
        for name, fingerprint in wanted.items():
            if (made_of := self.manifest["inputs"].get(name)) not in (fingerprint, None):
                raise ValueError(
                    f"{where}: {self.folder} was captured with {name} {made_of}, this run has {fingerprint}; "
                    f"capture again, or point to the {name} it was made with"
                )
        skipped = set(self.manifest["counts"].get("skipped", []))
        for document, text in texts.items():
            at = self._find(document)
            if at is None:
                if document in skipped:
                    continue
                raise ValueError(f"{where}: {self.folder} has no document {document}; capture this run's corpus again")
            stored = self.index["text"][at].as_py() or None
            if stored not in (None, text_fingerprint(text)) or self.index["bytes"][at].as_py() != len(text.encode()):
                raise ValueError(
                    f"{where}: {self.folder} has another text of document {document}; capture this run's corpus again"
                )

    def _place(self, document: str) -> int:
        if (at := self._find(document)) is None:
            raise KeyError(document)
        return at

    def _find(self, document: str) -> int | None:
        begin = max(bisect.bisect_right(self._some_names, document) - 1, 0) * NAMES_STEP
        end = min(begin + NAMES_STEP, len(self))
        at = bisect.bisect_left(range(len(self)), document, begin, end, key=lambda n: self._names[n].as_py())
        return at if at < len(self) and self._names[at].as_py() == document else None

    def _group(self, group: int, columns: Sequence[str] | None = None) -> Rows:
        key = group, columns
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        rows = self._kept[key] = self._unpacked(group, columns)
        self._kept_tokens += rows.tokens
        while len(self._kept) > 1 and self._kept_tokens > self._keep_tokens:
            self._kept_tokens -= self._kept.popitem(last=False)[1].tokens
        return rows

    def _unpacked(self, group: int, columns: Sequence[str] | None = None) -> Rows:
        table = self._table(group, columns)
        try:
            return Rows(table, draws=self._draws)
        except DAMAGED as error:
            raise self._damaged_group(group, error) from None

    def _table(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        file = self._file(group >> 32)
        try:
            table = file.read_row_group(group & 0xFFFFFFFF, columns, use_threads=False)
            at = self._order[slice(*np.searchsorted(self._groups_in_order, (group, group + 1)))]
            if not joined(table, "document").equals(self._names.take(pa.array(at))):
                raise ValueError("other documents than the index says")
        except DAMAGED as error:
            raise self._damaged_group(group, error) from None
        return table

    def _open(self, part: int) -> pq.ParquetFile:
        path = part_path(self.folder, part)
        try:
            file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES, page_checksum_verification=True)
            if not file.schema_arrow.equals(SCHEMA):
                raise ValueError("other columns than a store has")
        except DAMAGED as error:
            raise ValueError(self._damaged(path, "not a readable Parquet file", error)) from None
        return file

    def _damaged_group(self, group: int, error: Exception) -> ValueError:
        path = part_path(self.folder, group >> 32)
        return ValueError(self._damaged(path, f"row group {group & 0xFFFFFFFF} is damaged", error))

    def _damaged(self, path: Path, what: str, error: Exception) -> str:
        return f"{path}: {what} ({first_line(error)}); `fuselm store verify {self.folder}` says what is left"
