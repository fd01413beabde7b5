"""Write a store by parts: a part has the traces of one window of the documents, whoever writes it."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fuselm.documents.corpus import Document
from fuselm.documents.token_counting import measure_sizes
from fuselm.stores.index import write_index
from fuselm.stores.parts import build_group_tables, part_path, read_part_number, write_tables
from fuselm.stores.rows import Trace
from fuselm.system.part_work import Complete, Fragment, make_parts, split_windows
from fuselm.system.progress import Progress

WINDOW_BYTES = 1 << 21  # of text, so that a window is the same for all sources; some 2^19 tokens


def write_windows(
    out: Path,
    documents: Sequence[Document],
    trace_window: Callable[[Sequence[Document]], tuple[Iterable[Trace], Callable[[], dict[str, Any]]]],
    *,
    progress: Progress,
) -> tuple[dict[str, int], list[dict[str, Any]]] | None:
    """Write the traces of documents to a store, together with all processes that do; a window becomes a part.

    `trace_window` returns a window's traces and a function that sums them up, as JSON has it, when they were taken.
    Return the counts of the index and the sums of all windows in order; None if another process finished the store.
    """
    windows = split_windows(measure_sizes(documents), WINDOW_BYTES)

    def make_part(number: int) -> Complete:
        traces, sums = trace_window(documents[windows[number]])
        fragment = write_fragment(out, number, traces)
        return lambda: fragment | {"sums": sums()}

    def finish(fragments: list[Fragment]) -> dict[str, Any]:
        return {"counts": index_parts(out, len(windows)), "sums": [fragment["sums"] for fragment in fragments]}

    sizes = [window.stop - window.start for window in windows]
    made = make_parts(out, sizes, make_part, finish, progress=progress, unit="documents")
    return None if made is None else (made["counts"], made["sums"])


def write_fragment(out: Path, number: int, traces: Iterable[Trace]) -> Fragment:
    """Write a part of a store, and return its fragment. Without traces there is no file."""
    found: Fragment = {"documents": 0, "tokens": 0, "entries": 0}
    texts = hashlib.sha256()

    def count() -> Iterator[Trace]:
        for trace in traces:
            found["documents"] += 1
            found["tokens"] += len(trace.tokens)
            found["entries"] += len(trace.distributions.ids)
            texts.update(f"{trace.document} {trace.text}\n".encode())
            yield trace

    counted = count()
    if (first := next(counted, None)) is None:
        return found
    path = part_path(out, number)
    write_tables(path, build_group_tables(itertools.chain([first], counted)), seal=True)
    return {"file": path.name, "texts": texts.hexdigest()[:16]} | found


def index_parts(out: Path, count: int) -> dict[str, int]:
    """Write the index of the first `count` parts, and remove others, which an earlier version left; return counts."""
    for path in out.glob("part-*.parquet"):
        if read_part_number(path) >= count:
            path.unlink()
    return write_index(out)
