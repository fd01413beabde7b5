"""Import what others wrote as a store: files of records in one of foreign.py's layouts.

derivation.py makes traces of the records.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fuselm.documents.corpus import Document
from fuselm.models.locating import Model
from fuselm.sources.interchange import derivation, distillkit, foreign
from fuselm.sources.interchange.foreign import ForeignRecord, LayoutTokenizer
from fuselm.stores import store
from fuselm.stores.merging import build_store_once
from fuselm.stores.store import Trace
from fuselm.system import fingerprints
from fuselm.system.errors import summarize_error
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.public_names import name_publicly

PROBED_ROWS = 4096  # the first rows, which show whether rows are shifted or renormalised
BATCH_ROWS = 64  # read from Parquet at a time

DERIVED = {  # what counts of an import mean
    "gold_estimated": "tokens are not among their rows' entries: each is taken to have an even share of the tail",
    "tokens_without_row": "tokens have no row: the store says nothing of them",
    "documents_tokenized_otherwise": "documents are not what the tokenizer makes of their text: no run can use them",
    "other_texts": "records have a text that is not in --documents: left out",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """Say how a file is read.

    With `ahead`, row i belongs to token i + 1. `tail` is the mass that was cut off rows that sum to 1.
    """

    layout: str
    ahead: bool | None = None
    tail: float | None = None


def import_files(
    path: Path,
    out: Path,
    *,
    reading: ImportOptions,
    tokenizer: Model,
    model: tuple[str, str | None] | None,
    compression: Mapping[str, Any] | None,
    documents: Iterable[Document] | None,
    progress: Progress,
) -> bool:
    """Make a store at `out` from the records at `path`; return whether anything was done.

    `model` names the model that made the records, and has its fingerprint if the model is here. With `documents`, a
    record takes the id of the document with its text, and records of other texts are left out. Raises `ValueError` that
    names the record.
    """
    files = _list_files(path)
    inputs = {f"file {n}": fingerprints.hash_file_once(file) for n, file in enumerate(files)}
    inputs["tokenizer"] = tokenizer.tokenizer_fingerprint
    name, fingerprint = (name_publicly(model[0]), model[1]) if model else (None, None)
    if fingerprint is not None:
        inputs["model"] = fingerprint
    ids = None if documents is None else {d.text: d.id for d in documents if isinstance(d.text, str)}
    if ids is not None:
        inputs["documents"] = fingerprints.hash_lines(itertools.chain.from_iterable(sorted(ids.items())))
    parameters = {
        "layout": reading.layout,
        "ahead": reading.ahead,
        "tail": reading.tail,
        "compression": compression,
        "made_by": name,
    }
    recipe = Recipe(
        stage="capture",
        parameters={key: value for key, value in parameters.items() if value is not None},
        inputs=inputs,
        about={"model": name, "revision": None},
    )
    tokens = foreign.load_layout_tokenizer(tokenizer, compression)

    def build(partial: Path) -> dict[str, Any]:
        for leftover in partial.glob("part-*.parquet"):
            leftover.unlink()
        counted: Counter[str] = Counter()
        progress.start(sum(file.stat().st_size for file in files), unit="bytes")
        traces = read_traces(files, reading, tokens, ids=ids, counted=counted, advance=progress.advance)
        counts = store.write_parts(partial, traces)
        return {**counts, **counted, "skipped": [], "vocabulary_size": tokens.vocabulary.size}

    return build_store_once(out, recipe, build)


def read_compression(path: Path | None, source: Path) -> dict[str, Any] | None:
    """Read DistillKit's configuration from the file named, else from the one beside the data.

    Raises `ValueError` if it is not one.
    """
    path = path or source / "compression_config.yaml"
    if not path.is_file():
        if path.parent == source:
            return None
        raise ValueError(f"{path}: no such file")
    try:
        return distillkit.check_compression(yaml.safe_load(path.read_bytes()))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {summarize_error(error)}") from None


def read_traces(
    files: Iterable[Path],
    reading: ImportOptions,
    tokens: LayoutTokenizer,
    *,
    ids: Mapping[str, str] | None = None,
    counted: Counter[str],
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Trace]:
    """Yield traces of all records; count in `counted` what had to be derived."""
    layout = foreign.LAYOUTS[reading.layout]
    if reading.ahead is not None and layout.is_fixed and reading.ahead != layout.is_ahead:
        raise ValueError(f"--rows: the rows of {reading.layout} are each token's own; drop it")
    ahead = layout.is_ahead if reading.ahead is None else reading.ahead

    def read_all() -> Iterator[tuple[str, str | None, ForeignRecord]]:
        for where, record, size in read_records(files):
            advance(size)
            try:
                one = layout.read(record, tokens)
                derivation.require_numbers(one, tokens.vocabulary.size)
                yield where, _get_document_id(record), one
            except (TypeError, AttributeError, LookupError, OverflowError) as error:
                raise ValueError(f"{where}: not a record of {reading.layout} ({summarize_error(error)})") from None
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None

    rows, first = read_all(), []
    while sum(len(f.rows) for _, _, f in first) < PROBED_ROWS and (next_one := next(rows, None)) is not None:
        first.append(next_one)
    probed = [f for _, _, f in first]
    if reading.ahead is None and not layout.is_fixed:
        derivation.check_places(probed, ahead, tokens)
    derivation.check_sums(probed, reading.tail, tokens.vocabulary.size)
    for where, document, one in itertools.chain(first, rows):
        try:
            trace = derivation.derive_trace(one, tokens, ahead=ahead, tail=reading.tail, counted=counted)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        text = trace[1]
        if ids is not None:
            if text not in ids:
                counted["other_texts"] += 1
                continue
            document = ids[text]
        yield replace(trace[0], document=document or where)


def _get_document_id(record: Mapping[str, Any]) -> str | None:
    return next((str(record[name]) for name in ("document", "id") if isinstance(record.get(name), str | int)), None)


def _list_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted([*path.glob("*.parquet"), *path.glob("*.jsonl")])
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise ValueError(f"{path}: no such file, nor a folder with .parquet or .jsonl files")
    return files


def read_records(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield each record with its place and its share of the file's bytes. Raises `ValueError` on anything else."""
    for file in files:
        if file.suffix == ".parquet":
            try:
                with pq.ParquetFile(file) as table:
                    share = file.stat().st_size // max(table.metadata.num_rows, 1)
                    for n, record in enumerate(
                        row for batch in table.iter_batches(BATCH_ROWS) for row in batch.to_pylist()
                    ):
                        yield f"{file.name}:{n}", record, share
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file}: not a readable Parquet file ({summarize_error(error)})") from None
            continue
        with open(file, "rb") as lines:
            for n, line in enumerate(lines):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{file}:{n + 1}: not JSON ({summarize_error(error)})") from None
                if not isinstance(record, dict):
                    raise ValueError(f"{file}:{n + 1}: a {type(record).__name__}, needs an object")
                yield f"{file.name}:{n}", record, len(line)
