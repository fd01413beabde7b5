"""Test that fields of files may have other names, in every kind of file that has rows."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest

from fuselm.documents.texts import TextRow, read_texts

COLUMNS = {"text": "body", "domain": "lang", "split": "part"}
ROWS = [
    {"body": "one", "lang": "english", "part": "dev", "text": "a title"},
    {"body": "deux", "lang": "french", "part": None, "text": "un titre"},
]
EXPECTED = [TextRow(domain="english", text="one", split="dev"), TextRow(domain="french", text="deux")]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as the file's ending says."""
    if path.suffix == ".parquet":
        pq.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".csv":
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(file.getvalue(), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def explain(file: Path, columns: dict[str, str]) -> str:
    """Return the message of a file that is refused, without the file's name."""
    with pytest.raises(ValueError) as caught:
        list(read_texts(file, columns=columns))
    return str(caught.value).removeprefix(f"{file}:").lstrip()


KINDS = pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "arrow"])


@KINDS
def test_fields_are_read_by_their_names(tmp_path, ending):
    assert list(read_texts(write_rows(tmp_path / f"a.{ending}", ROWS), columns=COLUMNS)) == EXPECTED


@KINDS
def test_a_field_that_no_row_has_is_refused(tmp_path, ending):
    file = write_rows(tmp_path / f"a.{ending}", ROWS)
    message = explain(file, COLUMNS | {"domain": "language"})
    assert message.startswith("no row has 'language'" if ending.startswith("json") else "no 'language' column (found ")
    assert "fix" in message
    assert "'contents'" in explain(file, COLUMNS | {"text": "contents"})


def test_messages_name_the_field_of_the_file(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"body": "x", "part": "train2", "lang": "a"}])
    assert explain(file, COLUMNS).startswith("1: 'part' is 'train2', and needs to be one of train, dev, heldout")
    file = write_rows(tmp_path / "b.jsonl", [{"body": "x", "lang": []}])
    assert explain(file, {"text": "body", "domain": "lang"}).startswith("1: 'lang' is []; it needs to be a name")
    file = write_rows(tmp_path / "c.jsonl", [{"body": 7, "text": "x"}])
    assert explain(file, {"text": "body"}).startswith("1: no 'body' string ('body' is 7); each line needs one")


def test_a_field_may_serve_twice(tmp_path):
    file = write_rows(tmp_path / "a.parquet", [{"word": "one"}])
    assert list(read_texts(file, columns={"text": "word", "domain": "word"})) == [TextRow(domain="one", text="one")]
