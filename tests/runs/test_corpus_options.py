"""Test the options of texts in whole runs: fields with other names, and keys that stay what they were without them."""

import json
from pathlib import Path

import pytest
import tiny_run
from tiny_run import fuselm

from fuselm.runs import config


@pytest.fixture
def renamed_rows(texts) -> list[dict[str, str]]:
    return [{"body": row["text"], "lang": row["domain"], "text": "title"} for row in tiny_run.short(texts)]


def read_documents(folder: Path) -> list[dict]:
    (path,) = folder.glob("out/corpus/*/documents.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_renamed_fields_give_the_documents_of_plain_ones(tmp_path, byte_level, renamed_rows, texts):
    columns = {"files": [str(tmp_path / "a" / "corpus.jsonl")], "columns": {"text": "body", "domain": "lang"}}
    renamed = tiny_run.write(
        tmp_path / "a", target=byte_level, sources={"own": byte_level}, rows=renamed_rows, corpus=columns
    )
    plain = tiny_run.write(tmp_path / "b", target=byte_level, sources={"own": byte_level}, rows=tiny_run.short(texts))
    assert fuselm("capture", renamed).code == fuselm("capture", plain).code == 0
    assert read_documents(tmp_path / "a") == read_documents(tmp_path / "b")
    wrong = fuselm("capture", renamed, "corpus.columns.domain=language")
    assert wrong.code == 2 and "no row has 'language', which corpus.columns names; fix that option" in wrong.err


def test_columns_that_are_not_given_are_in_no_key(tmp_path, byte_level, texts):
    path = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=tiny_run.short(texts))
    assert "columns" not in config.load(path).model_dump()["corpus"]
    given = config.load(path, ["corpus.columns={text: body}"]).model_dump()["corpus"]
    assert given["columns"] == {"text": "body"}


def test_columns_of_plain_text_are_refused(tmp_path, byte_level, texts):
    path = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=tiny_run.short(texts))
    for n in range(4):
        (tmp_path / f"{n}.txt").write_text(f"text {n}", encoding="utf-8")
    outcome = fuselm("capture", path, f"corpus.files=['{tmp_path}/*.txt']", "corpus.columns={text: body}")
    assert outcome.code == 2
    assert "corpus.columns: does nothing here, because every file is plain text; drop it" in outcome.err
    outcome = fuselm("capture", path, "corpus.columns={title: body}")
    assert outcome.code == 2 and "corpus.columns.title" in outcome.err
