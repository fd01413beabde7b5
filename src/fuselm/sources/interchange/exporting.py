"""Export a store for other tools to read: a file of records in one of foreign.py's layouts."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuselm.documents.corpus import Document
from fuselm.models.locating import Model
from fuselm.sources.interchange import foreign
from fuselm.sources.interchange.foreign import LayoutTokenizer
from fuselm.stores import store
from fuselm.stores.store import Store, Trace
from fuselm.system import atomic_files
from fuselm.system.progress import Progress

GROUP_RECORDS = 256  # written to Parquet at a time


def export_store(
    folder: Path,
    out: Path,
    *,
    layout: str,
    ahead: bool | None,
    renormalise: bool,
    tokenizer: Model,
    documents: Iterable[Document] | None,
    progress: Progress,
) -> int:
    """Write a store's documents to the file `out`, JSON lines or Parquet by its name; return how many."""
    found, chosen = Store(folder), foreign.LAYOUTS[layout]
    if out.exists():
        raise ValueError(f"{out}: there already; name another file")
    if out.suffix not in (".jsonl", ".parquet") or (layout in ("vllm", "openai") and out.suffix != ".jsonl"):
        raise ValueError(
            f"{out}: {layout} is written to {'.jsonl' if chosen.is_fixed else '.jsonl or .parquet'}; name it so"
        )
    if ahead is not None and chosen.is_fixed:
        raise ValueError(f"--rows: the rows of {layout} are each token's own; drop it")
    tokens = foreign.load_layout_tokenizer(tokenizer)
    texts = {} if documents is None else {d.id: d.text for d in documents if isinstance(d.text, str)}
    progress.start(len(found), unit="documents")

    def convert_traces() -> Iterator[dict[str, Any]]:
        for trace in found:
            text = texts.get(trace.document) if documents is not None else _spell_text(trace, tokens)
            if text is not None and trace.text not in ("", store.fingerprint_text(text)):
                raise ValueError(f"document {trace.document}: --documents has another text of it; name this store's")
            if text is None and layout == "openai":
                raise ValueError(
                    f"document {trace.document}: its tokens do not spell its text, which {layout} needs; "
                    "--documents names the run's documents.jsonl"
                )
            trace = _renormalise(trace) if renormalise else trace
            yield chosen.write(trace, text, tokens, chosen.is_ahead if ahead is None else ahead)
            progress.advance(1)

    atomic_files.write_file(out, lambda path: _write_records(path, out.suffix, convert_traces()))
    return len(found)


def _spell_text(trace: Trace, tokens: LayoutTokenizer) -> str | None:
    """Return the text if the tokens spell it, else None."""
    joined = b"".join(tokens.vocabulary.token_bytes[i] or b"" for i in trace.tokens.tolist())
    for data in (joined, joined[1:]):
        text = data.decode("utf-8", "replace")
        if store.fingerprint_text(text) == trace.text:
            return text
    return None


def _renormalise(trace: Trace) -> Trace:
    d = trace.distributions
    sums = np.bincount(d.rows, np.exp(d.logprobs.astype(np.float64)), minlength=len(d))
    return replace(trace, distributions=replace(d, logprobs=(d.logprobs - np.log(sums[d.rows])).astype(np.float32)))


def _write_records(path: Path, suffix: str, rows: Iterator[dict[str, Any]]) -> None:
    if suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(foreign.dump_record(row) + "\n" for row in rows)
        return
    writer = None
    try:
        while batch := list(itertools.islice(rows, GROUP_RECORDS)):
            table = pa.Table.from_pylist(batch, schema=writer.schema if writer else None)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer:
            writer.close()
    if not writer:
        pq.write_table(pa.table({"document": pa.array([], pa.string())}), path)
