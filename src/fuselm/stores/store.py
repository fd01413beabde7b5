"""Read the stores that capture, align and fuse write, and that all later stages read.

A store is a folder of Parquet files with one row per document, their index, and the manifest of the stage that wrote
it; docs/store.md describes every field.
"""

import bisect
import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from fuselm.documents.document import Document
from fuselm.documents.document_list import DocumentList
from fuselm.models.chat.messages import Dialogue
from fuselm.stores import parts, rules, trust
from fuselm.stores.index import (
    INDEX,
    INDEX_SCHEMA,
    PART_TOKENS,
    find_index_fault,
    read_index,
    write_index,
    write_part,
    write_parts,
)
from fuselm.stores.kept_groups import KeptGroups
from fuselm.stores.parts import DAMAGED, GROUP_TOKENS, part_path, write_tables
from fuselm.stores.rows import (
    GOLD_COLUMNS,
    SCHEMA,
    TRAINING_COLUMNS,
    FlatColumns,
    RowGroup,
    Trace,
    TrainingRows,
    build_table,
    flatten_columns,
    join_chunks,
)
from fuselm.system import atomic_files, manifest
from fuselm.system.errors import summarize_error
from fuselm.system.remote_paths import open_path

OPEN_FILES = 64
NAMES_STEP = 32  # every 32nd name of the index is kept as a Python string

__all__ = ["DAMAGED", "GROUP_TOKENS", "INDEX", "INDEX_SCHEMA", "PART_TOKENS", "SCHEMA", "Store", "Trace"]
__all__ += ["build_table", "fingerprint_text", "part_path", "write_index", "write_part", "write_parts", "write_tables"]


def fingerprint_text(text: str | Dialogue) -> str:
    """Return the first 16 hex digits of a text's sha256; those of everything in a conversation."""
    data = text.encode() if isinstance(text, str) else text.spell_whole().encode()
    return hashlib.sha256(data).hexdigest()[:16]


class Store:
    """Read a finished store, by document or from its beginning to its end.

    `documents` lists the ids, and `len(store)` counts them. `read(id)` returns a `Trace`: per token, its id, its start
    in bytes, and a distribution in natural logs. Iterating yields the trace of every document, in the order on disk, in
    which `store[0]` is the first.

    - `folder`: the folder of the store, as a string or a `Path`; also a remote one, such as `s3://bucket/store`, whose
      parts are copied to a temporary file each when they are first read.
    - `draws`: let entries that were sampled from a row's tail share its probability; if false, they are left out and
      the probability stays in the tail.
    - `keep_tokens`: keep recently read row groups of up to this many tokens in memory, for documents that are read in
      another order than on disk. With 0, only the index and the last row group are in memory.
    - `vocabulary_size`: the number of ids of the model that the ids belong to, if the manifest does not say it.
    - `salvage`: read what is left of a damaged store: row groups are checked without their file's
      checksum, and only the documents that are asked for must be good.

    A store that is not known to be sound (trust.py) is checked as it is read, before its numbers are used: each file by
    its checksum, each row group by the rules of `store verify`.

    Raises `ValueError` if the folder is no store or the store is damaged.

    >>> folder = str(fuselm.load_run("mine.yaml", quiet=True).capture()["other"].folder)
    >>> store = fuselm.Store(folder)
    >>> len(store) == len(store.documents)
    True
    >>> [trace.document for trace in store] == store.documents
    True
    >>> store.documents[0] in store
    True
    >>> trace = store.read(store.documents[0])
    >>> len(trace.distributions) == len(trace.tokens)
    True
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        draws: bool = True,
        keep_tokens: int = 0,
        vocabulary_size: int | None = None,
        salvage: bool = False,
    ):
        self.folder = folder = open_path(folder)
        self._draws, self._salvage = draws, salvage
        self.manifest = manifest.read(folder)
        try:
            self._expected = rules.read_expectations(self.manifest, vocabulary_size)
        except ValueError as error:
            raise ValueError(self._damaged(folder / "manifest.json", "damaged", error)) from None
        largest = trust.recall_largest_id(folder, self.manifest)
        is_known = largest is not None and largest < self._expected.vocabulary_size
        index = self._read_index(is_known)
        self.index = index.select(["document", "text", "bytes", "tokens"])
        self._names, self._texts = join_chunks(index, "document"), join_chunks(index, "text")
        self._sizes, self._lengths = index["bytes"].to_numpy(), index["tokens"].to_numpy()
        self._some_names = self._names.take(pa.array(np.arange(0, len(index), NAMES_STEP))).to_pylist()
        self._rows = index["row"].to_numpy()
        self._groups = index["part"].to_numpy().astype(np.int64) << 32 | index["group"].to_numpy()
        self._order = np.lexsort((self._rows, self._groups)).astype(np.int32)  # as they are on disk
        self._groups_in_order = self._groups[self._order]
        self._file = functools.lru_cache(OPEN_FILES)(self._open_part)
        self._kept = KeptGroups(keep_tokens)
        self._unchecked = set() if is_known else set(np.unique(self._groups).tolist())
        self._unhashed = set() if is_known or salvage else {group >> 32 for group in self._unchecked}
        self._largest, self._entries = -1, 0  # among what was checked
        self._has_names = True

    def _read_index(self, is_known: bool) -> pa.Table:
        path = self.folder / INDEX
        index = read_index(self.folder)
        try:
            if not is_known and not self._salvage:
                self._check_hash(path)
            if wrong := find_index_fault(index, self.manifest):
                raise ValueError(wrong)
        except DAMAGED as error:
            raise ValueError(self._damaged(path, "damaged", error)) from None
        return index

    def forget_names(self) -> None:
        """Free what finding documents by id takes, if all is known to be sound; then only places can be read."""
        if self._unchecked:
            return
        self._has_names = False
        self.index = INDEX_SCHEMA.empty_table().select(self.index.column_names)
        self._names = self._texts = pa.array([], pa.string())
        self._sizes = self._lengths = self._order = np.zeros(0, np.int32)
        self._groups_in_order, self._some_names = np.zeros(0, np.int64), []

    def check(self) -> None:
        """Check everything that was not checked yet, so that nothing is found wrong later. Raises `ValueError`."""
        for group in sorted(self._unchecked):
            self._read_table(group)

    @property
    def documents(self) -> list[str]:
        """Return the ids of all documents, in the order in which they are read fastest."""
        return self._names.take(pa.array(self._order)).to_pylist()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, document: str) -> bool:
        return self._find(document) is not None

    def __getitem__(self, number: int) -> Trace:
        """Read the document at that place on disk; -1 is the last. Raises `IndexError` if there is none."""
        if not isinstance(number, int):
            raise TypeError(f"store[{number!r}]: needs a number; `read` takes the id of a document")
        if not -len(self) <= number < len(self):
            raise IndexError(f"document {number}: the store has {len(self)}")
        return self.read(self._names[int(self._order[number])].as_py())

    def __repr__(self) -> str:
        stage = self.manifest["stage"]
        return f"Store({str(self.folder)!r}, {stage}, {len(self):,} documents, {int(self._lengths.sum()):,} tokens)"

    def __iter__(self) -> Iterator[Trace]:
        for group in np.unique(self._groups).tolist():
            yield from self._read_group(group)

    def read_tables(self, documents: Collection[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows of `documents` (None: all) as they are on disk, one table per row group.

        Written to another store as they are, they are not rounded twice.
        """
        chosen = None if documents is None else pa.array(sorted(documents), pa.string())
        wanted = ... if chosen is None else pc.is_in(self._names, chosen).to_numpy(zero_copy_only=False)
        for group in np.unique(self._groups[wanted]).tolist():
            table = self._read_table(group, wanted=chosen)
            yield table if chosen is None else table.filter(pc.is_in(table["document"], chosen))

    def read_columns(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """Yield a few columns, as they are on disk, one table per row group."""
        for group in np.unique(self._groups).tolist():
            yield self._read_table(group, ["document", *names]).select(list(names))

    def count_bytes_by_column(self) -> dict[str, int]:
        """Return the compressed size of each column, in bytes."""
        sizes: dict[str, int] = {}
        for number in np.unique(self._groups >> 32).tolist():
            metadata = self._file(number).metadata
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for column in map(group.column, range(group.num_columns)):
                    name = column.path_in_schema.partition(".")[0]
                    sizes[name] = sizes.get(name, 0) + column.total_compressed_size
        return sizes

    def read(self, document: str) -> Trace:
        """Read one document. Raises `KeyError` if it isn't there, `ValueError` if it is damaged."""
        return self.read_many([document])[0]

    def read_many(self, documents: Sequence[str]) -> list[Trace]:
        """Read several documents at a time, which costs less for each. Raises as `read` does."""
        found = list(map(self._locate, documents))
        traces = {at: self.read_at(at) for at in sorted(found, key=lambda at: (self._groups[at], self._rows[at]))}
        return [traces[at] for at in found]

    def has_documents(self, documents: pa.Array | pa.ChunkedArray) -> Bool[ndarray, "documents"]:
        """Flag those of many ids that are there."""
        return pc.is_in(documents, self._names).to_numpy(zero_copy_only=False)

    def read_in_order(self, documents: Iterable[str]) -> Iterator[Trace]:
        """Yield the traces of those `documents` that are there, in the order in which they are read fastest."""
        found = np.array([at for document in documents if (at := self._find(document)) is not None], np.int64)
        groups = self._groups[found]
        for at in found[np.lexsort((self._rows[found], groups))].tolist():
            yield self.read_at(at)

    def read_at(self, place: int) -> Trace:
        """Read the document at a place that `find_documents` returns."""
        return self._keep_group(int(self._groups[place])).read_trace(int(self._rows[place]))

    def read_for_training(self, document: str) -> TrainingRows:
        """Read what training needs of a document, in three quarters of the time. Raises as `read` does."""
        return self.read_for_training_at(self._locate(document))

    def read_for_training_at(self, place: int) -> TrainingRows:
        """Read what training needs of the document at a place that `find_documents` returns."""
        return self._keep_group(int(self._groups[place]), TRAINING_COLUMNS).read_training_rows(int(self._rows[place]))

    def read_gold(self, document: str) -> tuple[Float[ndarray, "tokens"], Bool[ndarray, "tokens"]]:
        """Read gold log-probabilities, and which rows have entries, in a fifth of the time. Raises as `read` does."""
        at = self._locate(document)
        return self._keep_group(int(self._groups[at]), GOLD_COLUMNS).read_gold(int(self._rows[at]))

    def find_documents(self, documents: pa.Array | pa.ChunkedArray) -> Int[ndarray, "documents"]:
        """Return the place of each document in the index, with which `token_counts` begins; -1 if it isn't there."""
        return pc.fill_null(pc.index_in(documents, value_set=self._names), -1).to_numpy(zero_copy_only=False)

    @property
    def token_counts(self) -> Int[ndarray, "documents"]:
        """Return the tokens of each document, in the order of the index."""
        return self._lengths

    @property
    def byte_counts(self) -> Int[ndarray, "documents"]:
        """Return the bytes of each document's text, in the order of the index."""
        return self._sizes

    def require_inputs(self, wanted: Mapping[str, str], documents: Sequence[Document], *, where: str) -> None:
        """Raise `ValueError` unless the store was made from `wanted` and holds the texts of `documents`.

        `wanted` maps names of inputs to fingerprints. Documents that the capture had to skip may be missing.
        """
        if self.manifest["stage"] != "capture":
            raise ValueError(f"{where}: {self.folder} is of stage {self.manifest['stage']}, needs a capture")
        if "tokenizer" in wanted and "tokenizer" not in self.manifest["inputs"]:
            raise ValueError(
                f"{where}: {self.folder} does not say whose tokens it has (inputs.tokenizer); capture again"
            )
        for name, fingerprint in wanted.items():
            if (made_of := self.manifest["inputs"].get(name)) not in (fingerprint, None):
                raise ValueError(
                    f"{where}: {self.folder} was captured with {name} {made_of}, this run has {fingerprint}; "
                    f"capture again, or point to the {name} it was made with"
                )
        skipped = set(self.manifest["counts"].get("skipped", []))
        ids = documents.ids if isinstance(documents, DocumentList) else pa.array([d.id for d in documents], pa.string())
        again = "capture this run's corpus again"
        for document, at in zip(documents, self.find_documents(ids), strict=True):
            if at < 0:
                if document.id in skipped:
                    continue
                raise ValueError(f"{where}: {self.folder} has no document {document.id}; {again}")
            stored, text = self._texts[at].as_py() or None, document.text
            if stored not in (None, fingerprint_text(text)) or self._sizes[at] != len(text.encode()):
                raise ValueError(f"{where}: {self.folder} has another text of document {document.id}; {again}")

    def _locate(self, document: str) -> int:
        if not isinstance(document, str):
            raise TypeError(f"document {document!r}: needs an id, a string of `documents`; `store[0]` takes a number")
        if (at := self._find(document)) is None:
            raise KeyError(document)
        return at

    def _find(self, document: str) -> int | None:
        begin = max(bisect.bisect_right(self._some_names, document) - 1, 0) * NAMES_STEP
        end = min(begin + NAMES_STEP, len(self))
        at = bisect.bisect_left(range(len(self)), document, begin, end, key=lambda n: self._names[n].as_py())
        return at if at < len(self) and self._names[at].as_py() == document else None

    def _keep_group(self, group: int, columns: Sequence[str] | None = None) -> RowGroup:
        return self._kept.find((group, columns), lambda: self._read_group(group, columns))

    def _read_group(self, group: int, columns: Sequence[str] | None = None) -> RowGroup:
        table, found = self._read_checked(group, columns)
        try:
            return RowGroup(flatten_columns(table) if found is None else found, draws=self._draws)
        except DAMAGED as error:
            raise self._damaged_group(group, error) from None

    def _read_table(
        self, group: int, columns: Sequence[str] | None = None, *, wanted: pa.Array | None = None
    ) -> pa.Table:
        return self._read_checked(group, columns, wanted=wanted)[0]

    def _read_checked(
        self, group: int, columns: Sequence[str] | None = None, *, wanted: pa.Array | None = None
    ) -> tuple[pa.Table, FlatColumns | None]:
        """Return a row group; and all its columns, flat, if it was checked just now."""
        file = self._file(group >> 32)
        is_checked = group not in self._unchecked
        try:
            names, found = list(columns) if columns is not None and is_checked else None, None
            table = parts.read_group(file, group & 0xFFFFFFFF, names)
            at = self._order[slice(*np.searchsorted(self._groups_in_order, (group, group + 1)))]
            if self._has_names and not join_chunks(table, "document").equals(self._names.take(pa.array(at))):
                raise ValueError("other documents than the index says")
            if not is_checked:
                found = self._check_group(group, table, at, wanted if self._salvage else None)
                table = table if columns is None else table.select(list(columns))
        except DAMAGED as error:
            raise self._damaged_group(group, error) from None
        return table, found

    def _check_group(
        self, group: int, table: pa.Table, at: Int[ndarray, "documents"], wanted: pa.Array | None
    ) -> FlatColumns:
        """Check a row group by all rules; in a damaged store, only the documents that are wanted must pass."""
        table.validate(full=True)
        found = flatten_columns(table)
        broken = rules.find_broken_rules(found, self._expected)
        differences = [("text", ~pc.equal(self._texts.take(pa.array(at)), found.texts).to_numpy(zero_copy_only=False))]
        differences += [("bytes", self._sizes[at] != found.flat["bytes"])]
        differences += [("tokens", self._lengths[at] != np.diff(found.edges["tokens"]))]
        for name, differ in differences:
            broken |= {n: f"the index has other {name} of it" for n in np.flatnonzero(differ).tolist()}
        if not broken:
            self._unchecked.discard(group)
            self._largest, self._entries = max(self._largest, found.largest_id), self._entries + len(found.flat["ids"])
            if not self._unchecked and not self._salvage:
                self._remember_as_sound()
            return found
        names = found.documents.take(pa.array(sorted(broken), pa.int64()))
        bad = names.filter(pc.is_in(names, wanted)) if wanted is not None else names
        if len(bad):
            rule = broken[found.documents.index(bad[0]).as_py()]
            raise ValueError(f"document {bad[0].as_py()}: {rule}")
        return found

    def _remember_as_sound(self) -> None:
        """Remember that the store is sound. Raises `ValueError` if the manifest counts other entries."""
        if self._entries != (counted := self.manifest["counts"]["entries"]):
            raise ValueError(f"there are {self._entries} entries, the manifest counts {counted}")
        trust.remember_store(self.folder, self.manifest, self._largest)

    def _open_part(self, number: int) -> pq.ParquetFile:
        path = part_path(self.folder, number)
        try:
            file = parts.open_parquet(path, SCHEMA, page_checksums=number not in self._unhashed)
            if number in self._unhashed:
                self._check_hash(path)
                self._unhashed.discard(number)
        except ValueError as error:
            raise ValueError(f"{error}; {self._advice}") from None
        return file

    def _check_hash(self, path: Path) -> None:
        if atomic_files.hash_file(path) != self.manifest["files"].get(path.name):
            raise ValueError(f"{path}: checksum differs, it is not the file that was written")

    def _damaged_group(self, group: int, error: Exception) -> ValueError:
        path = part_path(self.folder, group >> 32)
        return ValueError(self._damaged(path, f"row group {group & 0xFFFFFFFF} is damaged", error))

    def _damaged(self, path: Path, what: str, error: Exception) -> str:
        reason = str(error) if type(error) is ValueError else summarize_error(error)
        return f"{path}: {what} ({reason}); {self._advice}"

    @property
    def _advice(self) -> str:
        return f"`fuselm store verify {self.folder}` says what is left"
