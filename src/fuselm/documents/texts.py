"""Read files of texts as rows, each with a domain and maybe a split.

Files of rows are JSON lines, JSON lists, CSV, TSV and Parquet; a plain text file is one document. A file of any other
kind is refused, because its syntax would be taken for text. docs/texts.md is the reference.
"""

import csv
import functools
import io
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuselm.documents import json_rows
from fuselm.documents.text_files import COMPRESSED, PARQUET, PLAIN, TABLES, check_file, find_kind, strip_endings

SPLITS = ("train", "dev", "heldout")
SYNONYMS = {"validation": "dev", "valid": "dev", "val": "dev", "development": "dev", "eval": "dev", "test": "heldout"}
LONGEST_DOMAIN = 200  # characters; a longer one is text in the wrong column


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """Hold a text of a file with its domain, and its split if the file names one."""

    domain: str
    text: str
    split: str | None = None


def read_texts(file: Path, domain: str | None = None) -> Iterator[TextRow]:
    """Yield each document of a file.

    `domain` is the domain of rows that name none; by default, it is the file's name. Raises `ValueError`, with the line
    or row, if something cannot be read.
    """
    check_file(file)
    kind, domain = find_kind(file), strip_endings(file) if domain is None else domain
    if kind in PARQUET:
        records = _read_parquet(file)
    else:
        content = _decode(file)
        if kind in PLAIN:
            if "\0" in content:
                raise ValueError(f"{file}: has NUL characters, so it is no plain text; convert it")
            _check_domain(domain, f"{file}: its domain")
            yield TextRow(domain=domain, text=content)
            return
        records = _read_table(file, content, kind) if kind in TABLES else _read_json(file, content, kind)
    for where, record in records:
        yield _parse_row(where, record, domain)


def _parse_row(where: str, record: Any, domain: str) -> TextRow:
    if not isinstance(record, Mapping) or not isinstance(record.get("text"), str):
        raise ValueError(f"{where}: no 'text' string{_describe_missing_text(record)}")
    text, said, own = record["text"], record.get("split"), record.get("domain")
    if has_surrogate(text):
        raise ValueError(f"{where}: 'text' has half of a surrogate pair, which is no text; fix or drop it")
    if said not in (None, *SPLITS):
        known = SYNONYMS.get(said.lower()) if isinstance(said, str) else None
        rename = f"rename it to {known}" if known else "rename it"
        raise ValueError(
            f"{where}: 'split' is {_shorten(said)}, and needs to be one of {', '.join(SPLITS)}; {rename}, or leave "
            "it out to have it drawn"
        )
    if own is not None:
        if not isinstance(own, str | int | float):
            raise ValueError(f"{where}: 'domain' is {_shorten(own)}; it needs to be a name, or left out")
        domain = str(own)
    _check_domain(domain, f"{where}: {'the name of the file, its domain,' if own is None else repr('domain')}")
    return TextRow(domain=domain, text=text, split=said)


def _describe_missing_text(record: Any) -> str:
    """Say what is needed, and what is there in place of a text."""
    if not isinstance(record, Mapping):
        return "; each line needs one, and may have a 'domain'"
    if (named := record.get("text")) is not None:
        return f" ('text' is {_shorten(named)}); each line needs one, and may have a 'domain'"
    found = _list_columns(list(record))
    for name in ("messages", "conversations"):
        if name in record:
            return f"{found}; only plain text is read: write each conversation as one 'text'"
    for name in ("content", "prompt", "body", "document", "Text", "TEXT"):
        if isinstance(record.get(name), str):
            return f"{found}; rename '{name}' to 'text' if that is the text"
    return f"{found}; each line needs one, and may have a 'domain'"


def _list_columns(names: Sequence[str]) -> str:
    shown = ", ".join(_shorten(name) for name in names[:7]) + (", …" if len(names) > 7 else "")
    return f" (found {shown})" if names else ""


def _check_domain(domain: str, where: str) -> None:
    if (problem := _find_problem(domain)) is not None:
        raise ValueError(f"{where} {problem}")


@functools.lru_cache
def _find_problem(domain: str) -> str | None:
    """Return what is wrong with a domain's name, or None."""
    if not domain.strip():
        return "is empty; name it, or leave it out to have the file's name"
    if has_surrogate(domain):
        return "has half of a surrogate pair, which is no text; fix or drop it"
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in domain):
        return f"is {_shorten(domain)}, with a control character; a name needs to be one line of text"
    if len(domain) > LONGEST_DOMAIN:
        return f"is {_shorten(domain)}, {len(domain)} characters long; a name may have {LONGEST_DOMAIN}"
    return None


def has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _shorten(value: Any) -> str:
    """Return the value as one short line that can be shown in a message."""
    shown = ascii(value) if not isinstance(value, str) or has_surrogate(value) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _decode(file: Path) -> str:
    data = _decompress(file)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise ValueError(f"{file}: UTF-16 or UTF-32, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}:{line}: not UTF-8 (byte {error.start} is {data[error.start]:#x}); convert it, say from Latin-1: "
            "iconv -f LATIN1 -t UTF-8"
        ) from None


def _decompress(file: Path) -> bytes:
    """Return a file's bytes, decompressed if it is compressed."""
    how = COMPRESSED.get(file.suffix.lower())
    if how is None:
        return file.read_bytes()
    try:
        if how == "xz":
            import lzma

            with lzma.open(file) as opened:
                return opened.read()
        import pyarrow

        with pyarrow.input_stream(str(file), compression=how) as opened:
            return opened.read()
    except PermissionError:
        raise
    except Exception as error:  # each library has errors of its own for damage
        raise ValueError(f"{file}: cannot be unpacked as {how} ({_first_line(error)}); make it anew") from None


def _read_json(file: Path, content: str, kind: str) -> Iterator[tuple[str, Any]]:
    return json_rows.read_records(file, content, may_span_lines=kind == ".json")


def _read_table(file: Path, content: str, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of CSV or TSV, whose first row names the columns; an empty domain or split counts as none."""
    before = csv.field_size_limit(sys.maxsize)
    row = 0
    try:
        rows = csv.reader(io.StringIO(content, newline=""), delimiter=TABLES[kind], strict=True)
        names = [name.strip() for name in next(rows, [])]
        if "text" not in names:
            raise ValueError(
                f"{file}: no 'text' column{_list_columns(names)}; its first row needs to "
                f"name the columns, apart by {'tabs' if kind == '.tsv' else 'commas'}"
            )
        for row, values in enumerate(rows, 1):
            if not values:
                continue
            if len(values) != len(names):
                raise ValueError(f"{file}: row {row}: {len(values)} fields, and {len(names)} columns; fix its quotes")
            record = dict(zip(names, values, strict=True))
            yield f"{file}: row {row}", record | {n: record.get(n) or None for n in ("domain", "split")}
    except csv.Error as error:
        raise ValueError(f"{file}: row {row + 1}: not {kind[1:].upper()} ({error}); fix its quotes") from None
    finally:
        csv.field_size_limit(before)


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if "text" not in names:
                raise ValueError(f"{file}: no 'text' column{_list_columns(names)}; add one")
            columns = [name for name in ("text", "domain", "split") if name in names]
            batches = opened.iter_batches(columns=columns, batch_size=1024)
            for row, record in enumerate((record for batch in batches for record in batch.to_pylist()), 1):
                yield f"{file}: row {row}", record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged, or no Parquet ({_first_line(error)}); make it anew") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{file}: damaged, or no Parquet ({_first_line(error)}); make it anew") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
