"""Write documents into a folder, part by part, with an index of a few numbers for each document.

A folder of documents has one file, `documents.jsonl`, as long as that is small. Larger ones are parts of some 64 MiB,
`documents-00000.jsonl` and so on. The parts, joined, are the one file that they would be, and its hash identifies the
documents. `index.arrow` has where each document begins, its id, domain, split, bytes of text and tokens.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fuselm.documents.document import SPLITS, Document
from fuselm.system import atomic_files

if TYPE_CHECKING:
    import pyarrow

ONE_PART = "documents.jsonl"
INDEX = "index.arrow"
PART_BYTES = 64 << 20


def name_part(number: int) -> str:
    """Return the name of a part of several."""
    return f"documents-{number:05d}.jsonl"


class IndexBuilder:
    """Collect what the index keeps of each document: some 30 bytes, and 4 for each reader."""

    def __init__(self, readers: Sequence[str] = ()):
        self._readers = list(readers)
        self._domains: dict[str, int] = {}
        self._batches: list["pyarrow.Table"] = []
        self._begin()

    def _begin(self) -> None:
        self._ids: list[str] = []
        self._domain, self._split, self._dialogue = array("i"), array("b"), array("b")
        self._size, self._offset = array("i"), array("q")
        self._tokens = [array("i") for _ in self._readers]

    def add(self, document: Document, offset: int, token_counts: Sequence[int] = ()) -> None:
        """Add a document that begins at byte `offset` of its part."""
        self._ids.append(document.id)
        self._domain.append(self._domains.setdefault(document.domain, len(self._domains)))
        self._split.append(SPLITS.index(document.split))
        self._dialogue.append(not isinstance(document.text, str))
        self._size.append(len(document.text.encode()))
        self._offset.append(offset)
        for column, count in zip(self._tokens, token_counts, strict=True):
            column.append(count)
        if len(self._ids) >= 1 << 16:
            self._end_batch()

    def _end_batch(self) -> None:
        import pyarrow as pa

        columns = {
            "id": pa.array(self._ids, pa.string()),
            "domain": np.frombuffer(self._domain, np.int32),
            "split": np.frombuffer(self._split, np.int8),
            "is_dialogue": np.frombuffer(self._dialogue, np.int8),
            "size": np.frombuffer(self._size, np.int32),
            "offset": np.frombuffer(self._offset, np.int64),
            **{
                f"tokens {name}": np.frombuffer(counts, np.int32)
                for name, counts in zip(self._readers, self._tokens, strict=True)
            },
        }
        self._batches.append(pa.table(columns))
        self._begin()

    def build(self, parts: Sequence[tuple[str, int, int]], sha256: str) -> "pyarrow.Table":
        """Return the index. `parts` has a name, rows and bytes each; `sha256` is that of all parts joined."""
        import pyarrow as pa

        self._end_batch()
        described = {
            "domains": list(self._domains),
            "parts": [{"name": name, "rows": rows, "bytes": size} for name, rows, size in parts],
            "sha256": sha256,
        }
        return pa.concat_tables(self._batches).replace_schema_metadata({"documents": json.dumps(described)})


class DocumentWriter:
    """Write documents to a folder. `readers` names whose token counts are given with each document.

    The part being written is held in memory, so that a file is written whole or not at all.
    """

    def __init__(self, folder: Path, readers: Sequence[str] = (), *, part_bytes: int = PART_BYTES):
        self._folder = folder
        self._part_bytes = part_bytes
        self._index = IndexBuilder(readers)
        self._parts: list[tuple[str, int, int]] = []
        self._hash = hashlib.sha256()
        self._lines: list[bytes] = []
        self._offset = 0

    def add(self, document: Document, token_counts: Sequence[int] = ()) -> None:
        """Write one more document."""
        line = document.as_line()
        if self._lines and self._offset + len(line) > self._part_bytes:
            self._write_part(name_part(len(self._parts)))
        self._index.add(document, self._offset, token_counts)
        self._hash.update(line)
        self._lines.append(line)
        self._offset += len(line)

    def finish(self) -> None:
        """Write the last part and the index."""
        self._write_part(name_part(len(self._parts)) if self._parts else ONE_PART)
        write_index(self._folder / INDEX, self._index.build(self._parts, self._hash.hexdigest()))

    def _write_part(self, name: str) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.writelines(self._lines)

        atomic_files.write_file(self._folder / name, write)
        self._parts.append((name, len(self._lines), self._offset))
        self._lines, self._offset = [], 0


def write_index(path: Path, table: "pyarrow.Table") -> None:
    """Write an index, in a form that is opened without reading it."""
    import pyarrow as pa

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    atomic_files.write_file(path, write)
