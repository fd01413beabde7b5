"""inspection.py: a document of a finished run, token by token."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_run import fuselm

from fuselm import corpus, store
from fuselm.models import load_tokenizer, locate
from fuselm.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def finished(tmp_path_factory, byte_level, sentence_piece, word_piece, texts) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    run_file = tiny_run.write(
        folder,
        target=byte_level,
        sources={"zeta": byte_level, "alpha": sentence_piece, "words": word_piece},
        rows=[
            *tiny_run.short(texts, domains=1),
            *({"domain": "odd", "text": f"[bold]tab\there[/bold]\n é🙂{n}"} for n in range(3)),
        ],
        train=tiny_run.TRAIN | {"passes": 1},
    )
    outcome = fuselm("run", run_file, cache=tmp_path_factory.getbasetemp() / "cache")
    assert outcome.code == 0, outcome.err
    return folder / "out"


def parts(out: Path, number: int):
    folders = json.loads((out / "run.json").read_text())["folders"]
    document = corpus.read_documents(out / folders["corpus"], "train")[number]
    return document, store.Store(out / folders["fuse"]).read(document.id)


def shown(token: bytes) -> str:
    text = token.decode("utf-8", "backslashreplace").replace(" ", "·")
    return text.replace("\n", "\\n").replace("\t", "\\t")


def table(output: str) -> list[list[str]]:
    """Cells of the table's rows."""
    return [[cell.strip() for cell in line.split("│")] for line in output.splitlines() if "│" in line]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_every_token_is_shown_with_who_won(finished, byte_level, number):
    outcome = fuselm("inspect", finished, "--doc", number)
    assert outcome.code == 0, outcome.err
    document, fused = parts(finished, number)
    model = locate(str(byte_level))
    vocabulary = Vocabulary(load_tokenizer(model), model.output_size)
    rows = [row for row in table(outcome.out) if row[1]]
    assert [row[0] for row in rows] == [shown(vocabulary.token_bytes[t]) for t in fused.tokens.tolist()]
    names = ["alpha", "words", "zeta"]
    for row, weights, gold in zip(rows, fused.weights, fused.distributions.gold, strict=True):
        assert row[1].split()[0] == names[int(np.argmax(weights))]
        assert row[-1].startswith(f"{np.exp(gold):.3f}")
    assert f"{document.id}, {document.domain}, {len(fused.tokens)} tokens" in outcome.out
    for name in [*names, "fused"]:
        assert name in outcome.out.splitlines()[2]


def test_as_many_expected_tokens_are_shown_as_asked_for(finished):
    few, many = (fuselm("inspect", finished, "--top", top) for top in (1, 5))
    assert few.code == many.code == 0 and len(few.out) < len(many.out)


@pytest.mark.parametrize("number", [-1, 997])
def test_a_document_that_is_not_there_is_one_line(finished, number):
    outcome = fuselm("inspect", finished, "--doc", number)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.startswith(f"fuselm: --doc {number}: the run has training documents 0 to ")


def test_a_run_that_is_not_finished_is_one_line(tmp_path):
    outcome = fuselm("inspect", tmp_path)
    assert outcome.code == 2
    assert outcome.err == (
        f"fuselm: {tmp_path}: no finished run there; start it with `fuselm run`, or name another folder\n"
    )
