"""Write the traces of a corpus so that an interruption costs little and changes no byte.

Documents are taken a window at a time, and a window becomes a part of the store, in the documents' own order. Until the
window is complete, its traces go to blocks beside the parts, so that little has to be read again. Several processes may
share the windows (part_work.py).
"""

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.documents.passages import Passage, Prefix
from fuselm.stores import part_writing, store
from fuselm.stores.parts import read_table
from fuselm.stores.store import Trace
from fuselm.system import atomic_files, part_work
from fuselm.system.background import Background
from fuselm.system.part_work import Complete, Fragment
from fuselm.system.progress import Progress

SECONDS_PER_BLOCK = 15  # the most that an interruption may cost
WINDOW_TOKENS = 1 << 17  # enough documents to find some of similar length, few enough to hold in memory
WINDOW_BATCHES = 32
MOST_SKIPPED = 0.01  # share of the documents


def write_traces(
    read_batches: Callable[[list[list[Passage]]], Iterator[Iterable[Trace | None]]],
    documents: Sequence[Document],
    lengths: Sequence[int],
    out: Path,
    *,
    prefix: Prefix,
    batch_tokens: int,
    progress: Progress,
    take_sums: Callable[[], dict[str, float]] = dict,
) -> dict | None:
    """Write the traces that `read_batches` makes of batches of passages, together with all processes that do.

    `read_batches` is called once for each window, with its batches. For each batch it yields its documents' traces,
    with None for a document that can have none. A thread writes them as they come. `take_sums` returns what was summed
    over the last window. Return the counts, with the sums over all windows, or None if another process finished.
    """
    members = passages.group_documents(documents)
    windows = part_work.split_windows(lengths, max(WINDOW_TOKENS, WINDOW_BATCHES * batch_tokens))
    skipped = SkippedDocuments(len(documents))
    resumed = 0

    def make_part(number: int) -> Complete:
        nonlocal resumed
        window = windows[number]
        writer = ResumableWriter(out, number, documents[window], skipped, progress)
        there = writer.resume()
        done = {i for i, name in zip(range(window.start, window.stop), writer.names, strict=True) if name in there}
        resumed += len(done)
        if done:
            progress.advance(sum(lengths[i] for i in done))
        batches = passages.plan_batches(window, lengths, members, prefix=prefix, batch_tokens=batch_tokens)
        todo = [batch for batch in batches if not done.issuperset(passages.list_documents(batch))]
        with contextlib.ExitStack() as stack:
            stack.enter_context(writer)
            background = stack.enter_context(Background(writer.write))
            if not writer.is_complete:
                for batch, traces in zip(todo, read_batches(todo), strict=True):
                    read = passages.list_documents(batch)
                    background.put(([documents[i] for i in read], traces))
                    progress.advance(sum(lengths[i] for i in read if i not in done))
                background.put(([], None))
            writing, sums = stack.pop_all(), take_sums()

        def complete() -> Fragment:
            writing.close()
            return writer.fragment | {"sums": sums}

        return complete

    def finish(fragments: list[Fragment]) -> dict:
        everywhere = SkippedDocuments(len(documents))
        for name, domain in (document for fragment in fragments for document in fragment["skipped"]):
            everywhere.add(name, domain)
        counts = part_writing.index_parts(out, len(windows))
        sums = Counter[str]()
        for fragment in fragments:
            sums.update(fragment["sums"])
        return {**counts, "skipped": everywhere.names, "resumed_documents": resumed, **sums}

    resumed = sum(windows[n].stop - windows[n].start for n in part_work.list_done(out, len(windows)))
    sizes = [sum(lengths[window]) for window in windows]
    return part_work.make_parts(out, sizes, make_part, finish, progress=progress, unit="tokens")


class SkippedDocuments:
    """Count the documents that the model gives NaN for, and refuse too many of them."""

    def __init__(self, total: int):
        self.names: list[str] = []
        self._total, self._first = total, ""

    def add(self, name: str, domain: str) -> None:
        """Add one. Raises `ValueError` if there are more than `MOST_SKIPPED` of all documents."""
        self.names.append(name)
        self._first = self._first or f"document {name} ({domain})"
        if len(self.names) > MOST_SKIPPED * self._total:
            raise ValueError(
                f"capture: the model gives NaN for {len(self.names)} of {self._total} documents (first: "
                f"{self._first}), more than {MOST_SKIPPED:.0%}; try another dtype or capture.prefix_tokens=0, or leave "
                "the model out"
            )


class ResumableWriter:
    """Bring the traces of one window to disk: to blocks while it is read, then to a part of the store."""

    def __init__(
        self, out: Path, number: int, documents: Sequence[Document], skipped: SkippedDocuments, progress: Progress
    ):
        self.fragment: Fragment = {}
        self.is_complete = False
        self._domains = {d.id: d.domain for d in documents}
        self.names = list(self._domains)
        self._out, self._number, self._progress = out, number, progress
        self._skipped, self._left_out = skipped, list[tuple[str, str]]()
        self._tables: list[pa.Table] = []
        self._there: set[str] = set()
        self._unwritten: list[pa.Table] = []
        self._written = time.monotonic()

    def resume(self) -> set[str]:
        """Return the documents that are on disk already."""
        part = store.part_path(self._out, self._number)
        for path in (part, *self._list_blocks()):
            if path.exists() and not atomic_files.is_whole(path):
                self._progress.note(f"{path} is damaged; its documents are read again")
                path.unlink()
        if part.exists():  # written by a process that was killed just then, or by an earlier version
            self.is_complete = True
            table = read_table(part, columns=["document", "text", "counts"])
            self._left_out = [(name, self._domains[name]) for name in self._list_missing(table)]
            self._end(table)
            return set(self.names)
        self._tables = [read_table(block).cast(store.SCHEMA) for block in self._list_blocks()]
        self._there = {document for table in self._tables for document in table["document"].to_pylist()}
        return self._there

    def __enter__(self) -> "ResumableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Flush what was read, so that nothing is lost when something goes wrong."""
        if self._unwritten:
            self._write_block()

    def write(self, item: tuple[Sequence[Document], Iterable[Trace | None] | None]) -> None:
        """Write traces of documents of the window; None marks the end of them."""
        documents, traces = item
        if traces is not None:
            self._add_traces(documents, traces)
            if time.monotonic() - self._written >= SECONDS_PER_BLOCK:
                self._write_block()
            return
        table = self._order_rows()
        store.write_tables(store.part_path(self._out, self._number), [table], seal=True)
        self._unwritten, self._tables = [], []
        self._end(table)

    def _end(self, table: pa.Table) -> None:
        """Remove the blocks, and describe the part."""
        for block in self._list_blocks():
            block.unlink(missing_ok=True)
        texts = hashlib.sha256()
        for name, text in zip(table["document"].to_pylist(), table["text"].to_pylist(), strict=True):
            texts.update(f"{name} {text}\n".encode())
        counts = table["counts"]
        self.fragment = {
            "file": store.part_path(self._out, self._number).name,
            "texts": texts.hexdigest()[:16],
            "documents": len(table),
            "tokens": pc.sum(pc.list_value_length(counts)).as_py() or 0,
            "entries": pc.sum(pc.list_flatten(counts)).as_py() or 0,
            "skipped": self._left_out,
        }

    def _list_missing(self, table: pa.Table) -> list[str]:
        there = set(table["document"].to_pylist())
        return [name for name in self.names if name not in there]

    def _add_traces(self, documents: Sequence[Document], traces: Iterable[Trace | None]) -> None:
        good = []
        for document, trace in zip(documents, traces, strict=True):
            if trace is None:
                self._left_out.append((document.id, document.domain))
                self._progress.note(f"skipped {name_document(document)}: the model gives NaN")
                self._skipped.add(document.id, document.domain)
            elif document.id not in self._there:
                good.append(trace)
        self._tables.append(store.build_table(good))
        self._unwritten.append(self._tables[-1])

    def _write_block(self) -> None:
        numbers = [int(path.stem.rpartition("-")[2]) for path in self._list_blocks()]
        path = self._out / f".block-{self._number:05d}-{max(numbers, default=-1) + 1:05d}.parquet"
        store.write_tables(path, [pa.concat_tables(self._unwritten)], seal=True)
        self._unwritten, self._written = [], time.monotonic()

    def _list_blocks(self) -> list[Path]:
        return sorted(self._out.glob(f".block-{self._number:05d}-*.parquet"))

    def _order_rows(self) -> pa.Table:
        """Return the rows in the documents' order, each document once.

        A document may be in two blocks, as after a failure to sync the first.
        """
        table = pa.concat_tables([store.SCHEMA.empty_table(), *self._tables])
        place = {name: n for n, name in enumerate(self.names)}
        places = np.array([place[document] for document in table["document"].to_pylist()], np.int64)
        return table.take(pa.array(np.unique(places, return_index=True)[1]))


def name_document(document: Document) -> str:
    return f"document {document.id} ({document.domain})"
