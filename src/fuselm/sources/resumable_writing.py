"""Write the traces of a corpus so that an interruption costs little and changes no byte.

Documents are taken a window at a time, and a window becomes a part of the store, in the documents' own order. Until the
window is complete, its traces go to blocks beside the parts, so that little has to be read again.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.documents.passages import Passage, Prefix
from fuselm.stores import store
from fuselm.stores.store import Trace
from fuselm.system import atomic_files
from fuselm.system.background import Background
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
) -> dict:
    """Write the traces that `read_batches` makes of batches of passages.

    `read_batches` is called once, with the batches of all windows. For each batch it yields its documents' traces, with
    None for a document that can have none. A thread writes them as they come.
    """
    writer = ResumableWriter(out, documents, progress)
    members = passages.group_documents(documents)
    windows = list(split_windows(lengths, max(WINDOW_TOKENS, WINDOW_BATCHES * batch_tokens)))
    resumed = {w: writer.resume(w, documents[window]) for w, window in enumerate(windows)}
    done = set().union(*resumed.values())
    tokens_done = sum(n for n, d in zip(lengths, documents, strict=True) if d.id in done)
    progress.start(sum(lengths), unit="tokens", done=tokens_done)
    todo = {
        w: [
            batch
            for batch in passages.plan_batches(window, lengths, members, prefix=prefix, batch_tokens=batch_tokens)
            if not done.issuperset(documents[i].id for i in passages.list_documents(batch))
        ]
        for w, window in enumerate(windows)
        if not store.part_path(out, w).exists()
    }
    with writer, Background(writer.write) as background:
        made = iter(read_batches([batch for batches in todo.values() for batch in batches]))
        for w, batches in todo.items():
            for batch in batches:
                read = passages.list_documents(batch)
                background.put((w, [documents[i] for i in read], next(made)))
                progress.advance(sum(lengths[i] for i in read if documents[i].id not in done))
            background.put((w, [], None))
    counts = store.write_index(out)
    writer.check_skipped()
    return {**counts, "skipped": writer.skipped, "resumed_documents": len(done)}


class ResumableWriter:
    """Bring the traces of the window that is being read to disk."""

    def __init__(self, out: Path, documents: Sequence[Document], progress: Progress):
        self.skipped: list[str] = []
        self._out = out
        self._documents = documents
        self._place = {d.id: n for n, d in enumerate(documents)}
        self._progress = progress
        self._tables: dict[int, list[pa.Table]] = {}  # by window
        self._there: set[str] = set()
        self._unwritten: list[pa.Table] = []  # belong to `_window`
        self._window = 0
        self._written = time.monotonic()

    def resume(self, window: int, documents: Sequence[Document]) -> set[str]:
        """Return the documents of a window that are on disk already."""
        blocks = self._list_blocks(window)
        part = store.part_path(self._out, window)
        for path in (part, *blocks):
            if path.exists() and not atomic_files.is_whole(path):
                self._progress.note(f"{path} is damaged; its documents are read again")
                path.unlink()
        if part.exists():
            for block in blocks:
                block.unlink(missing_ok=True)
            there = set(pq.read_table(part, columns=["document"])["document"].to_pylist())
            self.skipped += [d.id for d in documents if d.id not in there]
            return {d.id for d in documents}
        self._tables[window] = [pq.read_table(block).cast(store.SCHEMA) for block in self._list_blocks(window)]
        there = {document for table in self._tables[window] for document in table["document"].to_pylist()}
        self._there |= there
        return there

    def __enter__(self) -> "ResumableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Flush what was read, so that nothing is lost when something goes wrong."""
        if self._unwritten:
            self._write_block(self._window)

    def write(self, item: tuple[int, Sequence[Document], Iterable[Trace | None] | None]) -> None:
        """Write traces of documents of a window; None marks the end of them."""
        self._window, documents, traces = item
        window = self._window
        if traces is not None:
            self._add_traces(window, documents, traces)
            if time.monotonic() - self._written >= SECONDS_PER_BLOCK:
                self._write_block(window)
            return
        table = self._order_rows(self._tables.pop(window))
        store.write_tables(store.part_path(self._out, window), [table], seal=True)
        for block in self._list_blocks(window):
            block.unlink()
        self._unwritten, self._written = [], time.monotonic()

    def check_skipped(self) -> None:
        if len(self.skipped) > MOST_SKIPPED * len(self._documents):
            first = name_document(self._documents[self._place[self.skipped[0]]])
            raise ValueError(
                f"capture: the model gives NaN for {len(self.skipped)} of {len(self._documents)} documents (first: "
                f"{first}), more than {MOST_SKIPPED:.0%}; try another dtype or capture.prefix_tokens=0, or leave the "
                "model out"
            )

    def _add_traces(self, window: int, documents: Sequence[Document], traces: Iterable[Trace | None]) -> None:
        good = []
        for document, trace in zip(documents, traces, strict=True):
            if trace is None:
                self.skipped.append(document.id)
                self._progress.note(f"skipped {name_document(document)}: the model gives NaN")
                self.check_skipped()
            elif document.id not in self._there:
                good.append(trace)
        self._tables[window].append(store.build_table(good))
        self._unwritten.append(self._tables[window][-1])

    def _write_block(self, window: int) -> None:
        numbers = [int(path.stem.rpartition("-")[2]) for path in self._list_blocks(window)]
        number = max(numbers, default=-1) + 1
        path = self._out / f".block-{window:05d}-{number:05d}.parquet"
        store.write_tables(path, [pa.concat_tables(self._unwritten)], seal=True)
        self._unwritten, self._written = [], time.monotonic()

    def _list_blocks(self, window: int) -> list[Path]:
        return sorted(self._out.glob(f".block-{window:05d}-*.parquet"))

    def _order_rows(self, tables: Sequence[pa.Table]) -> pa.Table:
        """Return the rows in the documents' order, each document once.

        A document may be in two blocks, as after a failure to sync the first.
        """
        table = pa.concat_tables([store.SCHEMA.empty_table(), *tables])
        places = np.array([self._place[document] for document in table["document"].to_pylist()], np.int64)
        return table.take(pa.array(np.unique(places, return_index=True)[1]))


def split_windows(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Split documents, in their order, into windows of about `most` tokens."""
    begin = tokens = 0
    for n, length in enumerate(lengths):
        tokens += length
        if tokens >= most or n == len(lengths) - 1:
            yield slice(begin, n + 1)
            begin, tokens = n + 1, 0


def name_document(document: Document) -> str:
    return f"document {document.id} ({document.domain})"
