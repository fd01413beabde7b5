"""Write the Parquet files of a store, either whole or not at all, and open them with care.

Somebody else may have made the folder, and so every number in its files: the sizes that a footer claims are checked
before memory is allocated for them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fuselm.stores.rows import SCHEMA, Trace, build_table
from fuselm.system import atomic_files
from fuselm.system.errors import summarize_error

GROUP_TOKENS = 4096  # in a row group, which is read whole: few enough to read one document, enough to compress

DAMAGED = (pa.ArrowException, OSError, ValueError, IndexError, MemoryError)  # what reading a damaged file may raise
BUFFER_BYTES = 1 << 15  # for reading a file; without a buffer, small columns cost a call each
MOST_BYTES = 1 << 26  # in memory for a column of a row group, unless its file is large too
MOST_RATIO = 64  # bytes in memory per byte on disk, beyond that


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


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def is_part(name: str) -> bool:
    """Return whether a file has the name of a part."""
    digits = name.removeprefix("part-").removesuffix(".parquet")
    return name == f"part-{digits}.parquet" and digits.isdecimal() and digits.isascii() and len(digits) >= 5


def read_part_number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


# ---- writing


def build_group_tables(traces: Iterable[Trace]) -> Iterator[pa.Table]:
    """Yield traces as tables, one row group at a time."""
    traces = iter(traces)
    while group := list(take_traces(GROUP_TOKENS, traces)):
        yield build_table(group)


def take_traces(tokens: int, traces: Iterator[Trace]) -> Iterator[Trace]:
    """Yield traces until they have at least `tokens` tokens together, or there are no more."""
    taken = 0
    while taken < tokens and (trace := next(traces, None)) is not None:
        taken += max(len(trace.tokens), 1)
        yield trace


def write_tables(path: Path, tables: Iterable[pa.Table], *, seal: bool = False) -> None:
    """Write rows in groups of `GROUP_TOKENS` tokens, either the whole file or none; `seal` as in atomic_files.py."""

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, SCHEMA, **WRITER) as writer:
            for table in tables:
                for group in _split_into_groups(table):
                    writer.write_table(group, row_group_size=max(len(group), 1))

    atomic_files.write_file(path, write, seal=seal)


def _split_into_groups(table: pa.Table) -> Iterator[pa.Table]:
    ends = np.cumsum(np.maximum(pc.list_value_length(table["tokens"]).to_numpy(), 1))
    begin = 0
    while begin < len(table):
        before = ends[begin - 1] if begin else 0
        end = int(np.searchsorted(ends, before + GROUP_TOKENS)) + 1
        yield table.slice(begin, end - begin)
        begin = end


# ---- reading


def open_parquet(path: Path, schema: pa.Schema, *, page_checksums: bool = True) -> pq.ParquetFile:
    """Open a Parquet file that must have these columns.

    Raises `ValueError`, with the path, if it is missing, damaged, has other columns or claims impossible sizes.
    """
    try:
        if not path.is_file():
            raise ValueError("is missing" if not path.exists() else "is no file")
        with atomic_files.hold_locally(path) as here:  # once open, it needs no name
            file = pq.ParquetFile(here, buffer_size=BUFFER_BYTES, page_checksum_verification=page_checksums)
        if not file.schema_arrow.equals(schema):
            raise ValueError("other columns than such a file has")
        for group in range(file.num_row_groups):
            _check_claims(file.metadata.row_group(group))
    except DAMAGED as error:
        raise ValueError(f"{path}: not a readable Parquet file ({summarize_error(error)})") from None
    return file


def _check_claims(group: pq.RowGroupMetaData) -> None:
    """Raise `ValueError` if a column would be far larger in memory than its bytes on disk can account for."""
    for column in map(group.column, range(group.num_columns)):
        width = 8 if column.physical_type in ("INT64", "DOUBLE", "BYTE_ARRAY") else 4
        claimed = max(column.num_values * width, column.total_uncompressed_size, group.num_rows * 4)
        if min(column.num_values, column.total_uncompressed_size, column.total_compressed_size, group.num_rows) < 0:
            raise ValueError(f"column {column.path_in_schema} has a size below 0")
        if claimed > max(MOST_BYTES, MOST_RATIO * column.total_compressed_size):
            raise ValueError(
                f"column {column.path_in_schema} claims {claimed} bytes from {column.total_compressed_size} on disk"
            )


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a part or a block of one, wherever it is; it was found whole just before."""
    with atomic_files.hold_locally(path) as here:
        return pq.read_table(here, columns=columns)


def read_group(file: pq.ParquetFile, group: int, columns: list[str] | None = None) -> pa.Table:
    """Read a row group of a part. Raises one of `DAMAGED` if that fails."""
    if not 0 <= group < file.num_row_groups:
        raise ValueError(f"there are {file.num_row_groups} row groups")
    return file.read_row_group(group, columns, use_threads=False)
