"""Tasks in a run: asked once, kept by recipe, shown beside bits per byte, and refused before anything is made."""

import json
from pathlib import Path

import pytest
import tiny_run
import yaml
from tiny_run import fuselm

LIMIT = 7


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, byte_level, sentence_piece, quickstart) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    rows = [row for row in quickstart if row["domain"] in ("english", "python")]
    return tiny_run.write(
        folder,
        target=byte_level,
        sources={"same": byte_level, "other": sentence_piece},
        rows=[{"domain": row["domain"], "text": row["text"][:401]} for row in rows[:17] + rows[-17:]],
        corpus={"files": [str(folder / "corpus.jsonl")], "heldout": 0.8, "dev": 0.1},
        train=tiny_run.TRAIN | {"passes": 1},
        evaluate={"tasks": ["copying_words", "last_words"], "limit": LIMIT},
    )


@pytest.fixture(scope="module")
def finished(run_file) -> Path:
    outcome = fuselm("run", run_file)
    assert outcome.code == 0, outcome.err
    assert "differences with 95% intervals" in outcome.out and "copying_words" in outcome.out
    return run_file.parent / "out"


def test_a_run_asks_all_its_models(finished):
    rows = json.loads((finished / "summary.json").read_text())["tasks"]
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("copying_words", "acc"),
        ("copying_words", "bits"),
        ("last_words", "acc"),
        ("last_words", "bits"),
        ("last_words_english", "acc"),
        ("last_words_english", "bits"),
        ("last_words_python", "acc"),
        ("last_words_python", "bits"),
    ]
    for row in rows:
        assert list(row["models"]) == ["same", "other", "base", "clm", "fused"]
        assert row["models"]["same"] == row["models"]["base"]
        assert list(row["differences"]) == ["fused-clm", "fused-base", "clm-base", "fused-same", "fused-other"]
        assert row["questions"] == (LIMIT if row["group"] or row["task"] == "copying_words" else 2 * LIMIT)
    folders = sorted(path.name.rpartition("-")[0] for path in (finished / "tasks").iterdir())
    assert folders == [f"{m}-{t}" for m in ("base", "clm", "fused", "other") for t in ("copying_words", "last_words")]
    for page in ("report.html", "model/README.md"):
        assert "copying_words" in (finished / page).read_text()


def test_answers_are_not_asked_for_again(run_file, finished):
    before = tiny_run.files(finished, "tasks")
    again = fuselm("evaluate", run_file)
    assert again.code == 0 and "nothing to do" in again.err and "last_words_python" in again.out
    more = fuselm("evaluate", finished, "--tasks", "copying_words,copying_numbers", "--limit", LIMIT, "--json")
    assert more.code == 0, more.err
    after = tiny_run.files(finished, "tasks")
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    assert {row["task"] for row in json.loads(more.out)} == {"copying_words", "copying_numbers"}
    assert (finished / "tasks.md").read_text().count("| `copying_numbers` | `acc` |") == 2
    assert yaml.safe_load((finished / "config.yaml").read_text())["evaluate"]["tasks"] == [
        "copying_words",
        "last_words",
    ]


def test_questions_about_held_out_text_are_files_for_lm_eval(finished, byte_level):
    from fuselm.results.tasks import catalogue

    folder = next((finished / "tasks").glob("base-last_words-*"))
    own = catalogue.find_tasks(["last_words_english"], include_path=str(folder), limit=LIMIT)
    rows = [json.loads(line) for line in (folder / "last_words_english.jsonl").read_text().splitlines()]
    assert [dict(doc) for doc in own.tasks["last_words_english"].eval_docs] == rows


def test_a_model_alone_is_asked_and_remembered(byte_level, tmp_path):
    command = ("evaluate", byte_level, "--tasks", "copying_words", "--limit", LIMIT, "--json")
    first = fuselm(*command, cache=tmp_path)
    assert first.code == 0, first.err
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "answers").rglob("*.parquet")}
    assert len(kept) == 1 and fuselm(*command, cache=tmp_path).out == first.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "answers").rglob("*.parquet")} == kept


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["evaluate.limit=5", "evaluate.tasks=[]"], "evaluate.limit: does nothing without tasks; name some"),
        (["evaluate.tasks=[copyin]"], "evaluate.tasks: lm-eval has no task 'copyin'"),
        (["evaluate.tasks=[code_completion]"], "evaluate.tasks: code_completion runs code that models write; allow it"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_made(run_file, tmp_path, given, told):
    outcome = fuselm("run", run_file, f"output={tmp_path / 'out'}", *given)
    assert outcome.code == 2 and told in outcome.err and not list(tmp_path.glob("out/capture/*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--limit", 5), "--limit: does nothing without --tasks"),
        (("--tasks", "copying", "--texts", "x"), "--texts and --tasks: take one"),
        (("--tasks", "last_words"), "asks about a run's held-out documents; name a run"),
        (("train.passes=2", "--tasks", "copying"), "train.passes=2: has no effect on a model"),
    ],
)
def test_what_does_nothing_is_told(byte_level, arguments, told):
    outcome = fuselm("evaluate", byte_level, *arguments)
    assert outcome.code == 2 and told in outcome.err
