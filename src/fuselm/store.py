"""Traces on disk: what capture, align and fuse write, and all later stages read. docs/store.md has every field.

A store is a folder of Parquet files, a row (and a row group) a document, and the manifest of the stage that wrote it.
A part file is written whole or not at all, so an interrupted stage goes on after its last part.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm import manifest
from fuselm.distributions import Distributions
from fuselm.errors import first_line

SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("bytes", pa.int32()),
        ("nats", pa.float64()),
        ("tokens", pa.list_(pa.int32())),
        ("starts", pa.list_(pa.int32())),
        ("gold", pa.list_(pa.float32())),
        ("tail", pa.list_(pa.float32())),
        ("counts", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("weights", pa.list_(pa.float32())),
    ]
)


BLOCK = 64  # documents that are read at a time where all are wanted
PART = 256  # documents of a part where nothing else decides
DAMAGED = (pa.ArrowException, OSError, ValueError)  # what reading a damaged file may raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One document's tokens, with a distribution for each.

    `nats` is the cross-entropy of the whole document under the source, in its own vocabulary: alignment keeps it.
    `weights` is how much each source gave to each token's distribution; no columns before fusion.
    """

    document: str
    size: int  # bytes of text
    nats: float
    tokens: Int[ndarray, "tokens"]
    starts: Int[ndarray, "tokens"]  # bytes; -1 for a space that the tokenizer put before the text
    distributions: Distributions
    weights: Float[ndarray, "tokens sources"]


def write_part(folder: Path, number: int, traces: Iterable[Trace]) -> None:
    """Write `part-<number>.parquet`, whole or not at all."""
    columns = [_to_row(trace) for trace in traces]
    table = pa.Table.from_pylist(columns, schema=SCHEMA)
    manifest.write_bytes(
        part_path(folder, number),
        lambda path: pq.write_table(table, path, compression="zstd", row_group_size=1, write_page_checksum=True),
    )


def write_parts(folder: Path, traces: Iterable[Trace]) -> None:
    """Write all of `traces`, `PART` documents to a part, holding no more than those."""
    traces = iter(traces)
    for number in itertools.count():
        if not (part := list(itertools.islice(traces, PART))):
            break
        write_part(folder, number, part)


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


class Store:
    """A finished store, read a document at a time.

    Raises `ValueError` if the folder is no store or the store is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = manifest.read(folder)
        self._files: list[tuple[Path, pq.ParquetFile]] = []
        self._place: dict[str, tuple[int, int]] = {}
        for path in sorted(folder.glob("part-*.parquet")):
            try:
                file = pq.ParquetFile(path, page_checksum_verification=True)
                if not file.schema_arrow.equals(SCHEMA):
                    raise ValueError("other columns than a store has")
                documents = file.read(columns=["document"]).column(0).to_pylist()
                if {file.metadata.num_rows, file.num_row_groups} != {len(documents)}:
                    raise ValueError("documents are missing")
            except DAMAGED as error:
                raise ValueError(
                    f"{path}: not a readable Parquet file ({first_line(error)}); delete {folder} and run again"
                ) from None
            self._place.update({document: (len(self._files), row) for row, document in enumerate(documents)})
            self._files.append((path, file))

    @property
    def documents(self) -> list[str]:
        return sorted(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[Trace]:
        documents = self.documents
        for begin in range(0, len(documents), BLOCK):
            yield from self.read_all(documents[begin : begin + BLOCK])

    def __contains__(self, document: str) -> bool:
        return document in self._place

    def read(self, document: str) -> Trace:
        """Raises `KeyError` for a document that isn't there, `ValueError` for one that is damaged."""
        return self.read_all([document])[0]

    def read_all(self, documents: Sequence[str]) -> list[Trace]:
        """Several at a time, which costs less for each. Raises as `read` does."""
        traces: dict[str, Trace] = {}
        for number in sorted({self._place[document][0] for document in documents}):
            path, file = self._files[number]
            here = [document for document in documents if self._place[document][0] == number]
            try:
                rows = file.read_row_groups([self._place[document][1] for document in here])
                traces |= zip(here, _from_rows(rows), strict=True)
            except DAMAGED as error:
                if len(here) > 1:  # which one is it?
                    return [self.read(document) for document in documents]
                raise ValueError(
                    f"{path}: document {here[0]} is damaged ({first_line(error)}); delete {self.folder} and run again"
                ) from None
        return [traces[document] for document in documents]


def _to_row(trace: Trace) -> dict:
    d = trace.distributions
    return {
        "document": trace.document,
        "bytes": trace.size,
        "nats": trace.nats,
        "tokens": trace.tokens,
        "starts": trace.starts,
        "gold": d.gold,
        "tail": d.tail,
        "counts": d.counts.astype(np.int32),
        "ids": d.ids,
        "logprobs": d.logprobs,
        "weights": trace.weights.ravel(),
    }


def _from_rows(table: pa.Table) -> Iterator[Trace]:
    lists = {field.name: table.column(field.name).combine_chunks() for field in SCHEMA if pa.types.is_list(field.type)}
    values = {name: column.values.to_numpy(zero_copy_only=False) for name, column in lists.items()}
    edges = {name: column.offsets.to_numpy() for name, column in lists.items()}
    documents, sizes, nats = (table.column(name).to_pylist() for name in ("document", "bytes", "nats"))
    for row in range(table.num_rows):

        def array(name: str, length: int | None = None, row: int = row) -> ndarray:
            begin, end = edges[name][row : row + 2]
            if length not in (None, end - begin):
                raise ValueError(f"{end - begin} values in column {name}, not {length}")
            return values[name][begin:end]

        tokens = array("tokens")
        counts = array("counts", len(tokens))
        entries = int(counts.sum())
        weights = array("weights")
        yield Trace(
            document=documents[row],
            size=sizes[row],
            nats=nats[row],
            tokens=tokens,
            starts=array("starts", len(tokens)),
            distributions=Distributions(
                offsets=np.append(0, np.cumsum(counts)).astype(np.int64),
                ids=array("ids", entries),
                logprobs=array("logprobs", entries),
                gold=array("gold", len(tokens)),
                tail=array("tail", len(tokens)),
            ),
            weights=weights.reshape(len(tokens), -1) if len(tokens) else np.zeros((0, 0), np.float32),
        )
