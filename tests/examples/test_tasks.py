"""examples/tasks: questions about held-out documents, asked by lm-eval of a finished run's models, and compared."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import tiny_run
from hypothesis import given
from hypothesis import strategies as st

from fuselm.documents.corpus import Document

TASKS = Path(__file__).parents[2] / "examples" / "tasks"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"tasks_{name}", TASKS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


items, results = load("items"), load("results")


@pytest.fixture(scope="module")
def domains(quickstart) -> dict[str, list[Document]]:
    result: dict[str, list[Document]] = {}
    for n, row in enumerate(quickstart):
        document = Document(id=f"{n}", origin=f"{n}", domain=row["domain"], split="heldout", text=row["text"])
        result.setdefault(row["domain"], []).append(document)
    return {domain: documents[:23] for domain, documents in result.items()}


# ---- the questions


def test_a_cloze_is_the_beginning_of_its_document_up_to_a_last_word(domains):
    for documents in domains.values():
        texts = {d.origin: d.text for d in documents}
        asked = items.cloze(documents)
        assert len({item["document"] for item in asked}) > 17
        for item in asked:
            text, known = texts[item["document"]], f"{item['context']} {item['word']}"
            assert text.startswith(known) and len(item["context"]) >= items.BEFORE
            assert len(item["word"]) >= 4 and item["word"].isalpha()
            after = text[len(known) :]
            assert after[:1] in (*".!?…", "") or not any(c.isalnum() for c in after.partition("\n")[0])


def test_a_continuation_is_the_documents_own_among_those_of_others_after_the_same_word(domains):
    for documents in domains.values():
        texts = {d.origin: d.text for d in documents}
        asked = items.continuation(documents)
        assert len(asked) == items.CONTINUATION and len({item["document"] for item in asked}) == len(documents)
        for item in asked:
            own, choices = item["choices"][item["gold"]], item["choices"]
            word = item["context"].split()[-1]
            assert f"{item['context']} {own}" in texts[item["document"]]
            assert len(set(choices)) == 4
            for choice in set(choices) - {own}:
                assert any(f"{word} {choice}" in t for origin, t in texts.items() if origin != item["document"])
            assert all(len(c.encode()) <= items.LENGTH or not any(map(str.isspace, c)) for c in choices)
            assert len(item["context"]) <= items.TOLD
        assert all(count > 11 for count in Counter(item["gold"] for item in asked).values())


@pytest.mark.parametrize("make", [items.cloze, items.continuation])
def test_questions_depend_on_the_documents_alone(domains, make):
    documents = domains["english"]
    assert make(documents) == make(list(documents))


def test_every_document_is_asked_about_before_any_is_asked_about_twice_as_often(domains, monkeypatch):
    monkeypatch.setattr(items, "CLOZE", 47)
    counts = Counter(item["document"] for item in items.cloze(domains["technical_english"]))
    assert counts.total() == 47 and max(counts.values()) <= 3


def test_little_text_gives_no_questions(domains):
    short = [
        Document(id=d.id, origin=d.origin, domain="a", split="heldout", text=d.text[:97]) for d in domains["english"]
    ]
    assert items.cloze(short) == items.continuation(short) == []
    assert items.continuation(domains["english"][:3]) == []


# ---- the numbers


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_counts_the_splits_that_are_as_uneven(one, other):
    count = one + other
    uneven = [abs(2 * sum(split) - count) >= abs(one - other) for split in itertools.product((0, 1), repeat=count)]
    assert results.mcnemar(one, other) == pytest.approx(sum(uneven) / 2**count)


def answered(right: list[list[int]], nats: float) -> dict:
    """Answers to a cloze in two domains, two questions a document."""
    answers = {}
    for n, marks in enumerate(right):
        rows = [{"document": f"{i // 2}", "acc": mark, "perplexity": -nats - i} for i, mark in enumerate(marks)]
        answers[f"cloze_{n}"] = {
            "values": {"acc": sum(marks) / len(marks), "acc_stderr": 0.03 + 0.01 * n},
            "items": rows,
        }
    return answers


NAMES = {"cloze_0": ("cloze", "en"), "cloze_1": ("cloze", "de")}


def test_a_difference_is_of_the_shares_and_the_bits_a_word():
    fused = answered([[1, 1, 0, 1, 0, 0, 1], [1, 0, 0]], nats=3.0)
    clm = answered([[1, 0, 0, 0, 1, 0, 0], [0, 0, 0]], nats=5.0)
    summary = results.summarize({"clm": clm, "fused": fused}, NAMES)
    assert list(summary["differences"]) == ["fused-clm"]
    found = summary["differences"]["fused-clm"]["cloze"]
    assert found["acc"]["domains"]["en"]["value"] == pytest.approx(2 / 7)
    assert found["acc"]["average"]["value"] == pytest.approx((2 / 7 + 1 / 3) / 2)
    only = {d: (c["only_first"], c["only_second"], c["p"]) for d, c in found["acc"]["domains"].items()}
    assert only == {"en": (3, 1, pytest.approx(10 / 16)), "de": (1, 0, 1.0)}
    assert (found["acc"]["average"]["only_first"], found["acc"]["average"]["p"]) == (4, pytest.approx(12 / 32))
    for cell in [*found["bits"]["domains"].values(), found["bits"]["average"]]:  # each word is better by two nats
        assert cell["value"] == pytest.approx(-2 / math.log(2)) and cell["low"] is None  # of few documents


def test_a_models_average_is_the_mean_of_domains_with_their_errors():
    of = results.summarize({"base": answered([[1, 0, 1, 0], [0, 0, 0, 1]], nats=2.0)}, NAMES)["models"]["base"]["cloze"]
    assert of["average"]["acc"] == pytest.approx(0.375)
    assert of["average"]["acc_stderr"] == pytest.approx(math.sqrt(0.03**2 + 0.04**2) / 2)
    assert of["domains"]["en"]["bits"] == pytest.approx((2 + 1.5) / math.log(2))
    assert of["domains"]["en"]["bits_stderr"] == pytest.approx(math.sqrt(5 / 3) / 2 / math.log(2))
    assert of["domains"]["en"]["items"] == 4


def test_the_page_has_a_row_for_each_model_and_difference():
    same = answered([[1, 0, 1], [0, 0, 1]], nats=2.0)
    page = results.page(results.summarize({"clm": same, "fused": same}, NAMES))
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "### cloze, % right", "### cloze, bits a word"
    ]  # fmt: skip
    assert page.splitlines()[2] == "|  | en | de | average |"
    assert page.count("| fused − clm | +0.0 –; 0 : 0, p = 1 |") == 1


# ---- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, byte_level, sentence_piece, quickstart) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    rows = [row for row in quickstart if row["domain"] in ("english", "python")]
    run_file = tiny_run.write(
        folder,
        target=byte_level,
        sources={"same": byte_level, "other": sentence_piece},
        rows=[{"domain": row["domain"], "text": row["text"][:401]} for row in rows[:17] + rows[-17:]],
        corpus={"files": [str(folder / "corpus.jsonl")], "heldout": 0.8, "dev": 0.1},
        train=tiny_run.TRAIN | {"passes": 1},
    )
    outcome = tiny_run.fuselm("run", run_file, cache=tmp_path_factory.getbasetemp() / "cache")
    assert outcome.code == 0, outcome.err
    return folder / "out"


def ask(run: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HOME": str(run.parent / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, TASKS / "run.py", run, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_runs_models_are_asked_once_each(finished, byte_level):
    done = ask(finished, "--limit", "3", "--json", "--add", f"again={byte_level}")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert list(summary["models"]) == ["other", "base", "clm", "fused", "again"]  # `same` is the base
    assert summary["models"]["again"] == summary["models"]["base"]
    assert list(summary["differences"]) == ["fused-clm", "fused-base", "clm-base"]
    for of in summary["models"].values():
        assert {kind: set(numbers["domains"]) for kind, numbers in of.items()} == {
            "cloze": {"english", "python"}, "continuation": {"english", "python"}
        }  # fmt: skip
        assert all(cell["items"] == 3 for numbers in of.values() for cell in numbers["domains"].values())
    assert json.loads((finished / "tasks" / "results.json").read_text()) == summary
    files = {path: path.stat().st_mtime_ns for path in (finished / "tasks" / "answers").iterdir()}
    assert len(files) == 5
    again = ask(finished, "--limit", "3", "--models", "clm,fused")
    assert again.stdout.startswith("### cloze, % right\n\n|  | english | python | average |")
    assert {path: path.stat().st_mtime_ns for path in (finished / "tasks" / "answers").iterdir()} == files


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--models", "clm,best"), "--models: {run} has no model 'best'; it has other, base, clm, fused"),
        (("--limit", "1"), "--limit 1: a standard error needs 2 questions or more"),
        (("--add", "best"), "--add best: not a name and a model; write it as NAME=MODEL"),
    ],
)
def test_what_can_not_be_asked_is_told_in_one_line(finished, arguments, expected):
    done = ask(finished, *arguments)
    assert (done.returncode, done.stderr) == (2, f"error: {expected.format(run=finished)}\n")


def test_a_folder_that_is_no_run_is_told(tmp_path):
    done = ask(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path}: no finished run there; start it with `fuselm run`, or name another folder\n"
    )
