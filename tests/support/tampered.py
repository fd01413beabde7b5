"""Take stores apart, change them and put them together so that every checksum and count fits: lies, not damage."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuselm.stores import store
from fuselm.system import atomic_files, manifest
from fuselm.system.manifest import Recipe


@dataclass
class Contents:
    """Hold the rows of a store by part, its index and its manifest, as Python values that may be changed."""

    parts: list[list[dict[str, Any]]]
    index: list[dict[str, Any]]
    made: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for part in self.parts for row in part]

    def row(self, n: int = 0) -> dict[str, Any]:
        """Return a row of several tokens and entries."""
        return [row for row in self.rows if len(row["tokens"]) > 2 and len(row["ids"]) > 2][n]

    def index_rows(self) -> None:
        """Make the index say what the rows do."""
        self.index = [
            {
                **{name: row[name] for name in ("document", "text", "bytes")},
                **{"tokens": len(row["tokens"]), "part": number, "group": 0, "row": n},
            }
            for number, part in enumerate(self.parts)
            for n, row in enumerate(part)
        ]
        self.index.sort(key=lambda row: row["document"].encode())
        counts = {"documents": len(self.rows), "tokens": sum(len(row["tokens"]) for row in self.rows)}
        self.made["counts"] |= counts | {"entries": sum(len(row["ids"]) for row in self.rows)}


def take_apart(folder: Path) -> Contents:
    names = sorted(name for name in manifest.read(folder)["files"] if name.startswith("part-"))
    parts = [pq.read_table(folder / name).to_pylist() for name in names]
    return Contents(parts=parts, index=pq.read_table(folder / store.INDEX).to_pylist(), made=manifest.read(folder))


def put_together(contents: Contents, out: Path) -> Path:
    """Write a store of these contents; files, checksums and key are right, unless `made` had them changed."""
    out.mkdir(parents=True)
    for number, rows in enumerate(contents.parts):
        table = pa.Table.from_pylist(rows, schema=store.SCHEMA)
        with pq.ParquetWriter(store.part_path(out, number), store.SCHEMA, write_page_checksum=True) as writer:
            if len(table):
                writer.write_table(table, row_group_size=len(table))  # one group, as `index_rows` says
    pq.write_table(pa.Table.from_pylist(contents.index, schema=store.INDEX_SCHEMA), out / store.INDEX)
    made = contents.made
    recipe = Recipe(stage=made["stage"], parameters=made["parameters"], inputs=made["inputs"])
    files = {path.name: atomic_files.hash_file(path) for path in sorted(out.iterdir())}
    (out / "manifest.json").write_text(json.dumps(made | {"key": recipe.key, "files": files}))
    return out


def tamper(folder: Path, out: Path, change: Callable[[Contents], Any], *, reindex: bool = True) -> Path:
    """Copy a store to `out` with a change; with `reindex`, index and counts are made to fit the changed rows."""
    shutil.rmtree(out, ignore_errors=True)
    contents = take_apart(folder)
    contents.index_rows()
    change(contents)
    if reindex:
        contents.index_rows()
    return put_together(contents, out)
