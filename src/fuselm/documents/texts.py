"""Read files of texts and conversations as rows, each with a domain and maybe a split.

Files of rows are JSON lines, JSON lists, CSV, TSV, Parquet and Arrow; a plain text file is one document. A file of any
other kind is refused, because its syntax would be taken for text. docs/texts.md is the reference.
"""

import csv
import functools
import io
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.documents import conversation_rows, json_rows, text_streams
from fuselm.documents.arrow_folders import ARROW
from fuselm.documents.conversation_rows import BadRow
from fuselm.documents.document import SPLITS
from fuselm.documents.text_files import JSON, PARQUET, PLAIN, TABLES, check_file, find_kind, strip_endings
from fuselm.models.chat.messages import Dialogue
from fuselm.system.remote_paths import is_remote

if TYPE_CHECKING:
    import pyarrow

FIELDS = ("text", "domain", "split")
SYNONYMS = {"validation": "dev", "valid": "dev", "val": "dev", "development": "dev", "eval": "dev", "test": "heldout"}
TEXT_COLUMN_NEEDED = "set corpus.columns.text to the one that has the text"
LONGEST_DOMAIN = 200  # characters; a longer one is text in the wrong column


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """Hold a text or conversation of a file with its domain, and its split if the file names one.

    `where` is the file and line or row, for messages.
    """

    domain: str
    text: str | Dialogue
    split: str | None = None
    where: str = field(default="", compare=False)


def read_texts(
    file: Path,
    domain: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    skip: Callable[[str], None] | None = None,
) -> Iterator[TextRow]:
    """Yield each document of a file.

    `domain` is the domain of rows that name none; by default, it is the file's name. `columns` says which fields of the
    file are `text`, `domain`, `split` or those of conversations, if they have other names. Raises `ValueError`, with
    the line or row, if something cannot be read, or if a file of rows has no field that `columns` names. A conversation
    that cannot be used is passed to `skip`, if it is given, as the message that would have been raised.
    """
    check_file(file)
    kind, domain = find_kind(file), strip_endings(file) if domain is None else domain
    renamed = dict(columns or {})
    names = {name: renamed.get(name, name) for name in (*FIELDS, *conversation_rows.FIELDS)}
    if kind in PARQUET:
        records = _read_parquet(file, names, renamed)
    elif kind in ARROW:
        records = _read_arrow(file, names, renamed)
    else:
        blocks = text_streams.read_text_blocks(file)
        if kind in PLAIN:
            content = "".join(blocks)
            if "\0" in content:
                raise ValueError(f"{file}: has NUL characters, so it is no plain text; convert it")
            _check_domain(domain, f"{file}: its domain")
            yield TextRow(domain=domain, text=content, where=str(file))
            return
        records = (
            _read_table(file, blocks, kind, names, renamed)
            if kind in TABLES
            else json_rows.read_records(file, blocks, may_span_lines=kind == ".json")
        )
    unseen = set(renamed.values()) if kind in JSON else set()
    where = ""
    for where, record in records:
        if unseen and isinstance(record, Mapping):
            unseen -= record.keys()
        try:
            yield _parse_row(where, record, domain, names, renamed)
        except BadRow as error:
            if skip is None:
                raise ValueError(str(error)) from None
            skip(str(error))
    if where and unseen:
        raise ValueError(f"{file}: no row has '{min(unseen)}', which corpus.columns names; fix that option")


def _parse_row(where: str, record: Any, domain: str, names: Mapping[str, str], renamed: Mapping[str, str]) -> TextRow:
    text_name = names["text"]
    text = _find_text(where, record, names, renamed)
    said, own = record.get(names["split"]), record.get(names["domain"])
    if isinstance(text, str) and has_surrogate(text):
        raise ValueError(f"{where}: '{text_name}' has half of a surrogate pair, which is no text; fix or drop it")
    if said is not None and said not in SPLITS:
        known = SYNONYMS.get(said.lower()) if isinstance(said, str) else None
        rename = f"rename it to {known}" if known else "rename it"
        raise ValueError(
            f"{where}: '{names['split']}' is {_shorten(said)}, and needs to be one of {', '.join(SPLITS)}; {rename}, "
            "or leave it out to have it drawn"
        )
    if own is not None:
        if not isinstance(own, (str, int, float)):
            raise ValueError(f"{where}: '{names['domain']}' is {_shorten(own)}; it needs to be a name, or left out")
        domain = str(own)
    if _find_problem(domain) is not None:
        named = "the name of the file, its domain," if own is None else f"'{names['domain']}'"
        _check_domain(domain, f"{where}: {named}")
    return TextRow(domain=domain, text=text, split=said, where=where)


def _find_text(where: str, record: Any, names: Mapping[str, str], renamed: Mapping[str, str]) -> str | Dialogue:
    """Return a row's text or conversation: what `columns` names first, then `text`, then a conversation."""
    text_name, is_object = names["text"], type(record) is dict or isinstance(record, Mapping)
    text = record.get(text_name) if is_object else None
    form = conversation_rows.find_form(record, names) if is_object else None
    if form is None and isinstance(text, str) and not renamed:
        return text
    is_conversation_named = any(name in renamed for name in conversation_rows.FIELDS) and "text" not in renamed
    is_text = isinstance(text, str) and bool(text.strip() or form is None) and not is_conversation_named
    if form is not None and not is_text:
        try:
            return conversation_rows.parse_conversation(record, names, form)
        except BadRow as error:
            raise BadRow(f"{where}: {error}") from None
    if isinstance(text, str):
        return text
    fields = [names.get(field, field) for field in conversation_rows.FORMS]
    if is_object and text is None and (empty := next((f for f in fields if f in record and record[f] is None), None)):
        raise BadRow(f"{where}: '{empty}' is null, so there is no conversation; drop the row")
    raise ValueError(f"{where}: no '{text_name}' string{_describe_missing_text(record, text_name)}")


def _describe_missing_text(record: Any, name: str) -> str:
    """Say what is needed, and what is there in place of a text, which is called `name`."""
    if not isinstance(record, Mapping):
        return "; each line needs one, and may have a 'domain'"
    if (found := record.get(name)) is not None:
        return f" ('{name}' is {_shorten(found)}); each line needs one, and may have a 'domain'"
    listed = _list_columns(list(record))
    for one, other in (("prompt", "completion"), ("completion", "prompt"), ("instruction", "output")):
        if isinstance(record.get(one), str):
            return f"{listed}; '{one}' makes a conversation with '{other}', or set corpus.columns.text={one}"
    for other in ("content", "prompt", "body", "document", "Text", "TEXT"):
        if isinstance(record.get(other), str):
            return f"{listed}; rename '{other}' to 'text' if that is the text, or set corpus.columns.text={other}"
    return f"{listed}; each line needs one, and may have a 'domain'"


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
    """Tell whether a text has half of a surrogate pair, which UTF-8 cannot spell."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _shorten(value: Any) -> str:
    """Return the value as one short line that can be shown in a message."""
    shown = ascii(value) if not isinstance(value, str) or has_surrogate(value) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _require_columns(
    file: Path, there: Sequence[str], names: Mapping[str, str], renamed: Mapping[str, str], needed: str
) -> None:
    """Raise `ValueError` if a column is missing: that of the text, saying what is `needed`, or a `renamed` one."""
    is_conversation = conversation_rows.find_form(dict.fromkeys(there, True), names) is not None
    for column in (*(() if is_conversation else ("text",)), *renamed):
        if (name := names[column]) not in there:
            fix = f"fix corpus.columns.{column}" if column in renamed else needed
            raise ValueError(f"{file}: no '{name}' column{_list_columns(there)}; {fix}")


def _choose_columns(names: Mapping[str, str], there: Sequence[str]) -> list[str]:
    """Return the columns of a table that rows are made of."""
    return [name for name in dict.fromkeys((*names.values(), *conversation_rows.BESIDE)) if name in there]


def _read_table(
    file: Path, blocks: Iterable[str], kind: str, names: Mapping[str, str], renamed: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """Yield the rows of CSV or TSV, whose first row names the columns; an empty domain or split counts as none."""
    before = csv.field_size_limit(sys.maxsize)
    row = 0
    try:
        lines = (line for block in blocks for line in io.StringIO(block, newline=""))
        rows = csv.reader(lines, delimiter=TABLES[kind], strict=True)
        header = [name.strip() for name in next(rows, [])]
        needed = f"its first row needs to name the columns, separated by {'tabs' if kind == '.tsv' else 'commas'}"
        _require_columns(file, header, names, renamed, needed)
        for row, values in enumerate(rows, 1):
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(f"{file}: row {row}: {len(values)} fields, and {len(header)} columns; fix its quotes")
            record = dict(zip(header, values, strict=True))
            yield f"{file}: row {row}", record | {n: record.get(n) or None for n in (names["domain"], names["split"])}
    except csv.Error as error:
        raise ValueError(f"{file}: row {row + 1}: not {kind[1:].upper()} ({error}); fix its quotes") from None
    finally:
        csv.field_size_limit(before)


def _read_parquet(file: Path, names: Mapping[str, str], renamed: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.open("rb") if is_remote(file) else file) as opened:
            there = opened.schema_arrow.names
            _require_columns(file, there, names, renamed, TEXT_COLUMN_NEEDED)
            columns = _choose_columns(names, there)
            batches = opened.iter_batches(columns=columns, batch_size=1024)
            for row, record in enumerate((record for batch in batches for record in batch.to_pylist()), 1):
                yield f"{file}: row {row}", record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged, or no Parquet ({_first_line(error)}); write the file again") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{file}: damaged, or no Parquet ({_first_line(error)}); write the file again") from None


def _read_arrow(file: Path, names: Mapping[str, str], renamed: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of an Arrow file, be it a stream, as `datasets` writes, or a file with a footer."""
    import pyarrow

    try:
        with file.open("rb") if is_remote(file) else pyarrow.memory_map(str(file)) as mapped:
            schema, batches = _open_arrow(mapped)
            _require_columns(file, schema.names, names, renamed, TEXT_COLUMN_NEEDED)
            wanted = _choose_columns(names, schema.names)
            chosen = (batch.select(wanted) for batch in batches)
            pieces = (of.slice(begin, 1024) for of in chosen for begin in range(0, len(of), 1024))
            for row, record in enumerate((record for piece in pieces for record in piece.to_pylist()), 1):
                yield f"{file}: row {row}", record
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file}: damaged, or no Arrow ({_first_line(error)}); write the file again") from None


def _open_arrow(mapped: Any) -> "tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]":
    import pyarrow

    try:
        stream = pyarrow.ipc.open_stream(mapped)
        return stream.schema, iter(stream)
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        whole = pyarrow.ipc.open_file(mapped)
        return whole.schema, map(whole.get_batch, range(whole.num_record_batches))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
