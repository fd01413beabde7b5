"""Traces on disk: what capture, align and fuse write, and all later stages read. docs/store.md has every field.

A store is a folder of Parquet files, a row a document, their index, and the manifest of the stage that wrote it. A part
file is written whole or not at all, so an interrupted stage goes on after its last part.
"""

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm import manifest, rounding
from fuselm.distributions import Distributions
from fuselm.errors import first_line

GROUP_TOKENS = 4096  # of a row group, which is read as a whole: few enough for one document, enough to compress
PART_TOKENS = 1 << 19  # of a part where nothing else decides
OPEN_FILES = 64
INDEX = "index.parquet"
DAMAGED = (pa.ArrowException, OSError, ValueError)  # what reading a damaged file may raise


def _list(name: str, kind: pa.DataType) -> pa.Field:
    metadata = {"rounded": rounding.GRIDS[name]} if name in rounding.GRIDS else None
    return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False, metadata=metadata)


SCHEMA = pa.schema(
    [
        pa.field("document", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("bytes", pa.int32(), nullable=False),
        pa.field("nats", pa.float64(), nullable=False),
        _list("tokens", pa.int32()),
        _list("starts", pa.int32()),
        _list("gold", pa.float32()),
        _list("tail", pa.float32()),
        _list("counts", pa.int32()),
        _list("ids", pa.int32()),
        _list("logprobs", pa.float32()),
        _list("weights", pa.float32()),
    ],
    metadata={"fuselm": json.dumps({"format": manifest.FORMAT, "rounded": rounding.GRIDS})},
)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One document's tokens, with a distribution for each.

    `nats` is the cross-entropy of the whole document under the source, in its own vocabulary: alignment keeps it.
    `weights` is how much each source gave to each token's distribution; no columns before fusion.
    """

    document: str
    text: str = ""  # its `text_fingerprint`; empty where it isn't known
    size: int  # bytes of text
    nats: float
    tokens: Int[ndarray, "tokens"]
    starts: Int[ndarray, "tokens"]  # bytes; -1 for a space that the tokenizer put before the text
    distributions: Distributions
    weights: Float[ndarray, "tokens sources"]


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
    """A finished store, read by document or from its beginning to its end; in memory are its index and a row group.

    What was drawn from a row's tail shares its mass; without `draws`, it is left out, and the mass stays in the tail.
    Raises `ValueError` if the folder is no store or the store is damaged.
    """

    def __init__(self, folder: Path, *, draws: bool = True):
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
        self._names = _column(index, "document")
        self._rows = index["row"].to_numpy()
        self._groups = index["part"].to_numpy().astype(np.int64) << 32 | index["group"].to_numpy()
        self._order = np.lexsort((self._rows, self._groups)).astype(np.int32)  # as they are on disk
        self._groups_in_order = self._groups[self._order]
        self._file = functools.lru_cache(OPEN_FILES)(self._open)
        self._last: tuple[tuple[int, int], pa.Table] | None = None

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
            yield from self._traces(group, self._group(group))

    def tables(self, documents: Collection[str] | None = None) -> Iterator[pa.Table]:
        """Rows (None: all) as they are on disk, by row group: to be written elsewhere with nothing rounded twice."""
        chosen = None if documents is None else pa.array(sorted(documents), pa.string())
        wanted = ... if chosen is None else pc.is_in(self._names, chosen).to_numpy(zero_copy_only=False)
        for group in np.unique(self._groups[wanted]).tolist():
            table = self._group(group)
            yield table if chosen is None else table.filter(pc.is_in(table["document"], chosen))

    def read(self, document: str) -> Trace:
        """Raises `KeyError` for a document that isn't there, `ValueError` for one that is damaged."""
        return self.read_all([document])[0]

    def read_all(self, documents: Sequence[str]) -> list[Trace]:
        """Several at a time, which costs less for each. Raises as `read` does."""
        found = [self._find(document) for document in documents]
        if None in found:
            raise KeyError(documents[found.index(None)])
        traces: dict[int, Trace] = {}
        for at in sorted(found, key=lambda at: (self._groups[at], self._rows[at])):
            group = int(self._groups[at])
            (traces[at],) = self._traces(group, self._group(group).slice(self._rows[at], 1))
        return [traces[at] for at in found]

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

    def _find(self, document: str) -> int | None:
        at = bisect.bisect_left(range(len(self)), document, key=lambda n: self._names[n].as_py())
        return at if at < len(self) and self._names[at].as_py() == document else None

    def _group(self, group: int) -> pa.Table:
        if self._last is not None and self._last[0] == group:
            return self._last[1]
        part, number = group >> 32, group & 0xFFFFFFFF
        file = self._file(part)
        try:
            table = file.read_row_group(number, use_threads=False)
            at = self._order[slice(*np.searchsorted(self._groups_in_order, (group, group + 1)))]
            if not _column(table, "document").equals(self._names.take(pa.array(at))):
                raise ValueError("other documents than the index says")
        except DAMAGED as error:
            path = part_path(self.folder, part)
            raise ValueError(self._damaged(path, f"row group {number} is damaged", error)) from None
        self._last = group, table
        return table

    def _traces(self, group: int, table: pa.Table) -> list[Trace]:
        try:
            return from_table(table, draws=self._draws)
        except DAMAGED as error:
            path = part_path(self.folder, group >> 32)
            raise ValueError(self._damaged(path, f"row group {group & 0xFFFFFFFF} is damaged", error)) from None

    def _open(self, part: int) -> pq.ParquetFile:
        path = part_path(self.folder, part)
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
            if not file.schema_arrow.equals(SCHEMA):
                raise ValueError("other columns than a store has")
        except DAMAGED as error:
            raise ValueError(self._damaged(path, "not a readable Parquet file", error)) from None
        return file

    def _damaged(self, path: Path, what: str, error: Exception) -> str:
        return f"{path}: {what} ({first_line(error)}); `fuselm store verify {self.folder}` says what is left"


# ---- rows


def to_table(traces: Iterable[Trace]) -> pa.Table:
    """Traces as rows, rounded."""
    traces = list(traces)
    arrays: dict[str, list[ndarray]] = {field.name: [] for field in SCHEMA if pa.types.is_list(field.type)}
    for trace in traces:
        d = trace.distributions
        ids, logprobs = rounding.order_by_id(d.offsets, d.ids, d.logprobs)
        row = {
            "tokens": trace.tokens,
            "starts": trace.starts,
            "gold": rounding.round_gold(d.gold),
            "tail": rounding.round_tail(d.tail),
            "counts": d.counts,
            "ids": ids,
            "logprobs": rounding.round_logprobs(logprobs),
            "weights": rounding.round_weights(trace.weights.ravel()),
        }
        for name, values in row.items():
            arrays[name].append(values)
    columns: dict[str, pa.Array | list] = {
        "document": [trace.document for trace in traces],
        "text": [trace.text for trace in traces],
        "bytes": [trace.size for trace in traces],
        "nats": [trace.nats for trace in traces],
    }
    for name, parts in arrays.items():
        kind = SCHEMA.field(name).type
        offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
        values = pa.array(np.concatenate([np.zeros(0), *parts]).astype(kind.value_type.to_pandas_dtype()))
        columns[name] = pa.ListArray.from_arrays(offsets, values, type=kind)
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table, *, draws: bool = True) -> list[Trace]:
    """Rows as traces; `draws` as of `Store`. Raises `ValueError` where columns do not fit together."""
    flat, edges = {}, {}
    for field in SCHEMA:
        if pa.types.is_list(field.type):
            column = _column(table, field.name)
            flat[field.name] = column.flatten().to_numpy(zero_copy_only=False)
            edges[field.name] = column.offsets.to_numpy() - column.offsets[0].as_py()
    rows = np.append(0, np.cumsum(flat["counts"], dtype=np.int64))
    expected = {name: edges["tokens"] for name in ("starts", "gold", "tail", "counts")}
    expected |= {name: rows[edges["tokens"]] for name in ("ids", "logprobs")}
    for name, wanted in expected.items():
        if not np.array_equal(edges[name], wanted):
            raise ValueError(f"column {name} does not fit the document's tokens")
    if not draws:
        head = flat["logprobs"] > -np.inf
        rows = np.append(0, np.cumsum(head, dtype=np.int64))[rows]
        edges["ids"] = rows[edges["tokens"]]
        flat |= {name: flat[name][head] for name in ("ids", "logprobs")}
    ids, logprobs, tail = rounding.restore(rows, flat["ids"], flat["logprobs"], flat["tail"])
    names, texts, sizes, nats = (table[name].to_pylist() for name in ("document", "text", "bytes", "nats"))
    traces = []
    for n, document in enumerate(names):
        tokens = slice(*edges["tokens"][n : n + 2].tolist())
        entries = slice(*edges["ids"][n : n + 2].tolist())
        weights = flat["weights"][slice(*edges["weights"][n : n + 2].tolist())]
        count = tokens.stop - tokens.start
        traces.append(
            Trace(
                document=document,
                text=texts[n],
                size=sizes[n],
                nats=nats[n],
                tokens=flat["tokens"][tokens],
                starts=flat["starts"][tokens],
                distributions=Distributions(
                    offsets=rows[tokens.start : tokens.stop + 1] - entries.start,
                    ids=ids[entries],
                    logprobs=logprobs[entries],
                    gold=flat["gold"][tokens],
                    tail=tail[tokens],
                ),
                weights=weights.reshape(count, -1) if count else np.zeros((0, 0), np.float32),
            )
        )
    return traces


def _column(table: pa.Table, name: str) -> pa.Array:
    chunks = table[name].chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks or [pa.array([], table.schema.field(name).type)])
