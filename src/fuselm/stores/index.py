"""Write and read a store's index, which says where each document is.

The index is written after the parts, and checked when it is read, so that no document is mistaken for another.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fuselm.stores.parts import (
    DAMAGED,
    build_group_tables,
    is_part,
    open_parquet,
    part_path,
    read_part_number,
    take_traces,
    write_tables,
)
from fuselm.stores.rows import Trace, build_table, join_chunks
from fuselm.system import atomic_files
from fuselm.system.errors import summarize_error

PART_TOKENS = 1 << 19  # in a part, unless the caller decides
INDEX = "index.parquet"
INDEX_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("document", "text")]
    + [pa.field(name, pa.int32(), nullable=False) for name in ("bytes", "tokens", "part", "group", "row")]
)


def write_part(folder: Path, number: int, traces: Iterable[Trace]) -> None:
    """Write `part-<number>.parquet`, either whole or not at all."""
    write_tables(part_path(folder, number), [build_table(traces)])


def write_parts(folder: Path, traces: Iterable[Trace]) -> dict[str, int]:
    """Write all of `traces` to parts, then the index; return its counts as `write_index` does.

    At most one row group of traces is in memory at a time.
    """
    traces = iter(traces)
    for number in itertools.count():
        if (first := next(traces, None)) is None:
            return write_index(folder)
        part = take_traces(PART_TOKENS, itertools.chain([first], traces))
        write_tables(part_path(folder, number), build_group_tables(part))


def write_index(folder: Path) -> dict[str, int]:
    """Write the index of the parts in `folder`; return the number of documents, tokens and entries.

    Raises `ValueError` if a document is in the parts twice.
    """
    columns: list[pa.Table] = []
    entries = 0
    for path in sorted(folder.glob("part-*.parquet"), key=read_part_number):
        number = read_part_number(path)
        with atomic_files.hold_locally(path) as here:
            file = pq.ParquetFile(here)
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
    names = join_chunks(index, "document")
    if (twice := _find_first_unordered(names)) is not None:
        raise ValueError(f"{folder}: document {names[twice].as_py()} is there twice; take it from one store only")
    atomic_files.write_file(
        folder / INDEX,
        lambda path: pq.write_table(index, path, compression="zstd", write_statistics=False, write_page_checksum=True),
    )
    return {"documents": len(index), "tokens": pc.sum(index["tokens"]).as_py() or 0, "entries": entries}


def read_index(folder: Path) -> pa.Table:
    """Return the index of a store. Raises `ValueError`, with the path, if the file is not a valid index."""
    path = folder / INDEX
    file = open_parquet(path, INDEX_SCHEMA)
    try:
        index = file.read(use_threads=False)
        index.validate(full=True)
        if any(index[name].null_count for name in index.column_names):
            raise ValueError("it has nulls")
    except DAMAGED as error:
        raise ValueError(f"{path}: not a readable Parquet file ({summarize_error(error)})") from None
    return index


def find_index_fault(index: pa.Table, made: Mapping[str, Any]) -> str | None:
    """Return what is impossible in an index or contradicts its store's manifest; None if nothing is."""
    names = join_chunks(index, "document")
    if (at := _find_first_unordered(names)) is not None:
        return f"documents are not in order, each once (after {names[at].as_py()!r:.40})"
    numbers = {name: index[name].to_numpy() for name in ("bytes", "tokens", "part", "group", "row")}
    for name, column in numbers.items():
        if column.min(initial=0) < 0:
            return f"document {names[int(column.argmin())].as_py()!r:.40} has {name} {int(column.min())}"
    parts = {read_part_number(Path(name)) for name in made["files"] if is_part(name)}
    if unknown := sorted(set(np.unique(numbers["part"]).tolist()) - parts):
        return f"it has documents in part {unknown[0]}, which the manifest does not name"
    if (at := _find_first_misplaced(numbers)) is not None:
        return f"document {names[at].as_py()!r:.40} is said to be in a row that is another's, or not there"
    counts = made["counts"]
    for name, there in (("documents", len(index)), ("tokens", int(numbers["tokens"].sum(dtype=np.int64)))):
        if counts[name] != there:
            return f"it has {there} {name}, the manifest counts {counts[name]}"
    return None


def _find_first_unordered(names: pa.Array) -> int | None:
    """Return the position of the first name that is not below the next one, by bytes; None if there is none."""
    if len(names) < 2:
        return None
    at = pc.index(pc.less(names.slice(0, len(names) - 1), names.slice(1)), False).as_py()
    return at if at >= 0 else None


def _find_first_misplaced(numbers: Mapping[str, np.ndarray]) -> int | None:
    """Return the first document whose row does not follow the one before it in its row group; None if there is none."""
    groups = numbers["part"].astype(np.int64) << 32 | numbers["group"]
    order = np.lexsort((numbers["row"], groups))
    begins = np.searchsorted(groups[order], groups[order])
    wrong = np.flatnonzero(numbers["row"][order] != np.arange(len(order)) - begins)
    return int(order[wrong[0]]) if len(wrong) else None
