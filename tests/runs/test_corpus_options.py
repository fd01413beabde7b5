"""Test the options of texts in whole runs: fields with other names, and keys that stay what they were without them."""

import json
from pathlib import Path

import datasets
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


def test_a_dataset_gives_the_documents_of_its_rows(tmp_path, byte_level, texts):
    rows, sources = tiny_run.short(texts), {"own": byte_level}
    datasets.Dataset.from_list([{"body": row["text"], "kind": row["domain"]} for row in rows]).save_to_disk(
        tmp_path / "a" / "saved"
    )
    corpus = {"dataset": {"path": "saved", "text": "body", "domain": "kind"}}  # beside the run file
    fetched = tiny_run.write(tmp_path / "a", target=byte_level, sources=sources, rows=rows, corpus=corpus)
    plain = tiny_run.write(tmp_path / "b", target=byte_level, sources=sources, rows=rows)
    assert fuselm("capture", fetched).code == fuselm("capture", plain).code == 0
    assert read_documents(tmp_path / "a") == read_documents(tmp_path / "b")
    again = fuselm("capture", tmp_path / "a" / "out" / "config.yaml")
    assert again.code == 0 and again.stages == []


def test_columns_are_of_files_and_not_of_the_dataset(tmp_path, byte_level, renamed_rows):
    datasets.Dataset.from_dict({"text": [f"sentence {n}" for n in range(4)]}).save_to_disk(tmp_path / "saved")
    corpus = {
        "files": [str(tmp_path / "corpus.jsonl")],
        "columns": {"text": "body", "domain": "lang"},
        "dataset": str(tmp_path / "saved"),
    }
    path = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=renamed_rows, corpus=corpus)
    assert fuselm("capture", path).code == 0
    domains = {document["domain"] for document in read_documents(tmp_path)}
    assert domains == {"saved", *(row["lang"] for row in renamed_rows)}


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({}, "corpus: no texts; give it `files`, or a `dataset`"),
        ({"dataset": "d", "columns": {"text": "body"}}, "corpus.columns: does nothing without `files`"),
        ({"dataset": {"path": "d", "column": "body"}}, "corpus.dataset.column: unknown option"),
        ({"dataset": {"split": "test"}}, "corpus.dataset.path: missing"),
    ],
)
def test_what_a_corpus_lacks_is_said(tmp_path, byte_level, texts, corpus, message):
    path = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=[], corpus=corpus)
    with pytest.raises(ValueError) as caught:
        config.load(path)
    assert message in str(caught.value)
