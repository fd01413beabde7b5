"""A run file that is written for a user: it can be run as it is, editors find its schema, nothing is overwritten."""

import json
import os
import re

import jsonschema
import pytest
import yaml
from tiny_run import fuselm

from fuselm.runs import config
from fuselm.runs.new_run_file import Choices, name_sources, write_run_file


@pytest.fixture
def notes(tmp_path, monkeypatch, byte_level):
    """Some text files in a folder of the current directory, and a model beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for n in range(4):
        (tmp_path / "notes" / f"{n}.txt").write_text(f"Note {n}: the river rose again, and nobody saw it.\n" * 5)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a").symlink_to(byte_level)
    return tmp_path


CHOICES = Choices(
    target="models/a",
    sources={"a": "models/a", "qwen": "Qwen/Qwen2.5-0.5B"},
    texts=["notes"],
    output="runs/mine",
)


def test_the_file_holds_what_was_chosen_and_is_read_from_anywhere(notes, monkeypatch):
    written, _ = write_run_file(notes / "project" / "mine.yaml", CHOICES)
    assert [path.name for path in written] == ["mine.yaml", "run.schema.json"]
    (notes / "elsewhere").mkdir()
    monkeypatch.chdir(notes / "elsewhere")
    run = config.load(written[0])
    assert os.path.samefile(run.target.model, notes / "models" / "a")
    assert os.path.samefile(run.corpus.files[0], notes / "notes")
    assert (run.sources["qwen"].model, run.output) == ("Qwen/Qwen2.5-0.5B", "runs/mine")
    assert list(notes.joinpath("project").glob(".*.yaml")) == []


def test_editors_find_the_schema_that_the_first_line_names(notes):
    path = write_run_file(notes / "mine.yaml", CHOICES)[0][0]
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    schema = json.loads((path.parent / named[1]).read_text())
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(path.read_text()))


def test_what_is_commented_out_may_be_used(notes):
    path = write_run_file(notes / "mine.yaml", CHOICES)[0][0]
    text = re.sub(
        r"^( *)# (?=(heldout|train|  passes|  learning_rate|capture|  batch_tokens):)",
        r"\1",
        path.read_text(),
        flags=re.M,
    )
    path.write_text(text)
    assert config.load(path).train == config.TrainOptions() and "\ntrain:\n  passes: 4" in text


def test_nothing_is_overwritten(notes):
    path = write_run_file(notes / "mine.yaml", CHOICES)[0][0]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"mine.yaml: exists already; nothing is overwritten, so name another file"):
        write_run_file(path, CHOICES)
    assert path.read_bytes() == before
    (notes / "one.txt").write_text("A paragraph.\n\n" * 300)
    (notes / "other-texts.jsonl").touch()
    alone = Choices(target="models/a", sources={"a": "org/a"}, texts=["one.txt"], output="o")
    with pytest.raises(ValueError, match=r"other-texts.jsonl: exists already"):
        write_run_file(notes / "other.yaml", alone)
    assert not (notes / "other.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "models/b.gguf"}, "models/b.gguf: no such file or folder, and not a hub id"),
        ({"sources": {"b": "../b/c/d"}}, "../b/c/d: no such file or folder, and not a hub id"),
        ({"texts": ["nowhere"]}, "nowhere: no such file"),
        ({"sources": {"base": "org/a"}}, "mine.yaml: sources.base: not a usable name"),
        ({"target": "notes"}, "notes: no config.json; needs a Hugging Face model folder"),
        ({"target": "notes/1.txt"}, "notes/1.txt: not a model; needs a hub id, a folder with a model, or a GGUF file"),
        ({"sources": {"a": "models/a"}}, "--source: the target is the only one, so there is nothing to learn from"),
        ({"sources": {"a": "org/a", "b": "org/a"}}, "mine.yaml: sources.b: org/a is listed twice"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(notes, changes, message):
    fields = {name: getattr(CHOICES, name) for name in CHOICES.__slots__}
    with pytest.raises(ValueError) as caught:
        write_run_file(notes / "mine.yaml", Choices(**fields | changes))
    assert message in str(caught.value)
    assert {path.name for path in notes.iterdir()} == {"notes", "models"}


def test_sources_get_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["Qwen/Qwen2.5-Coder-0.5B", "models/Qwen3.gguf", "big=org/Model", "models/base", "models/7"]
    assert name_sources(given) == {
        "qwen": "Qwen/Qwen2.5-Coder-0.5B",
        "qwen-2": "models/Qwen3.gguf",
        "big": "org/Model",
        "base-2": "models/base",
        "7": "models/7",
    }
    assert name_sources(["b"], own="models/own") == {"own": "models/own", "b": "b"}
    assert name_sources(["b", "mine=models/own"], own="models/own") == {"b": "b", "mine": "models/own"}
    with pytest.raises(ValueError, match=r"--source a=y: the name 'a' is given twice; take another"):
        name_sources(["a=x", "a=y"])


def test_one_text_file_is_enough_for_init_and_run(tmp_path, monkeypatch, byte_level, sentence_piece, texts):
    """`fuselm init` and `fuselm run` go through with nothing edited in between, from one file of someone's text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.md").write_text("\n\n".join(row["text"] for row in texts[:12]))
    outcome = fuselm(
        "init", "book.yaml", "--target", byte_level, "--source", f"other={sentence_piece}", "--texts", "book.md"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [
        "wrote book.yaml",
        "wrote book-texts.jsonl",
        "wrote .fuselm/run.schema.json",
        "note: too few documents in book: these texts were copied to book-texts.jsonl, cut into pieces if they are "
        "long, and later changes to their files do not count",
        "next: fuselm plan book.yaml, then fuselm run book.yaml",
    ]
    small = ["train.passes=1", "train.batch_documents=2", "train.precision=float32", "capture.batch_tokens=131"]
    outcome = fuselm("run", "book.yaml", *small)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "runs" / "book" / "report.html").is_file()
