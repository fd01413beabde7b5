"""answering.py on tiny models: what a source reads before it answers, and what is kept of its answers."""

import io
import json
from dataclasses import replace

import chat_models
import pytest
import torch
from captures import source_of
from rich.console import Console

from fuselm.documents.corpus import Document
from fuselm.documents.cutting import Reader
from fuselm.documents.document_list import read_documents
from fuselm.models.chat.dialogue_reading import add_chat_template
from fuselm.models.chat.messages import Dialogue, Message
from fuselm.models.locating import locate_model
from fuselm.sources import answering
from fuselm.sources.answer_choice import choose_by_majority
from fuselm.system.progress import Progress

ANSWERS = 3


@pytest.fixture(scope="module")
def source(byte_level, tmp_path_factory):
    folder = chat_models.add_template(byte_level, tmp_path_factory.mktemp("models") / "chat")
    source = source_of(folder)
    return replace(source, vocabulary=add_chat_template(locate_model(str(folder)), source.vocabulary))


@pytest.fixture
def ended(source, monkeypatch):
    """Let the model, which knows nothing, say nothing but ASCII and end each turn at last."""
    draw_continuations, (letter,) = answering.draw_continuations, source.vocabulary.segment("a").ids.tolist()
    others = torch.tensor([not (spelled or b"\xff").isascii() for spelled in source.vocabulary.token_bytes])

    def draw_and_end(*args, **kwargs):
        drawn = draw_continuations(*args, **kwargs)
        drawn[others[drawn]] = letter
        drawn[:, -1] = answering.find_ends(source)[0]
        return drawn

    monkeypatch.setattr(answering, "draw_continuations", draw_and_end)


@pytest.fixture(scope="module")
def documents(texts) -> list[Document]:
    rows = chat_models.make_rows(texts)[:5]
    dialogues = [Dialogue(messages=tuple(Message(**m) for m in row["messages"])) for row in rows]
    return [
        Document(id=f"{n:06d}", origin=f"{n:06d}", domain="a", split="train", text=text)
        for n, text in enumerate([dialogues[0], "a plain text beside them", *dialogues[1:]])
    ]


def draw(source, documents, monkeypatch, drawn):
    """Return a source whose model says `drawn` in turn, whatever it is asked."""
    ends = answering.find_ends(source)[:1]
    said = iter(drawn)

    def draw_said(model, prompts, *, each, padding):
        rows = [source.vocabulary.segment(next(said)).ids.tolist() + ends for _ in range(len(prompts) * each)]
        longest = max(map(len, rows))
        return torch.tensor([ids + [padding] * (longest - len(ids)) for ids in rows])

    monkeypatch.setattr(answering, "draw_continuations", draw_said)


def answer(source, documents, out, **options):
    out.mkdir(exist_ok=True)
    reader = Reader(name="own", vocabulary=source.vocabulary, max_tokens=source.context_length)
    asked = {"readers": [reader], "answers": ANSWERS, "tokens": 17, "min_p": 0.05, "seed": 0, "name": "some"} | options
    asked = {"choose": choose_by_majority} | asked
    counts = answering.write_answers(
        source, documents, out, progress=Progress(Console(file=io.StringIO()), "write"), **asked
    )
    return list(read_documents(out)), counts


def test_a_prompt_is_what_stands_before_the_last_response(source, documents):
    for document in (d for d in documents if isinstance(d.text, Dialogue)):
        prompt = answering.encode_prompt(source, document.text)
        spelled = b"".join(source.vocabulary.token_bytes[i] or b"" for i in prompt).decode("utf-8", "ignore")
        assert spelled.endswith("# assistant\n")
        assert all(m.content.split()[0] in spelled for m in document.text.messages[:-1])
        assert document.text.messages[-1].content not in spelled


def test_the_best_answers_are_conversations_and_the_best_and_worst_pairs(source, documents, tmp_path, monkeypatch):
    draw(source, documents, monkeypatch, ["yes", "no", "Yes."] * 5)
    written, counts = answer(source, documents, tmp_path)
    assert {d.text.messages[-1].content for d in written} == {"yes"}
    asked = [d for d in documents if isinstance(d.text, Dialogue)]
    assert [(d.id, d.origin) for d in written] == [(f"some-answer-{d.id}", d.origin) for d in asked]
    assert all(d.text.responses == [d.text.messages[-1]] for d in written)
    pairs = [json.loads(line) for line in (tmp_path / answering.PAIRS_FILE).read_text().splitlines()]
    size = 5 * len(b"yes\xff")
    assert counts == {"documents": 5, "bytes": {"a": size}, "asked": 5, "pairs": 5} and len(pairs) == 5
    for pair, document in zip(pairs, asked, strict=True):
        assert pair["chosen"] == [{"role": "assistant", "content": "yes"}]
        assert pair["rejected"] == [{"role": "assistant", "content": "no"}]
        assert pair["prompt"] == [m.as_row() for m in document.text.messages[:-1]]
    assert not list(tmp_path.glob("answers-*"))


def test_answers_that_are_empty_or_too_long_for_a_reader_are_left_out(source, documents, tmp_path, monkeypatch):
    draw(source, documents, monkeypatch, [" ", "word " * 600, "yes", *[" "] * 12])
    written, counts = answer(source, documents, tmp_path)
    assert [d.text.messages[-1].content for d in written] == ["yes"] and counts["pairs"] == 0


def test_a_source_whose_answers_cannot_be_used_is_named(source, documents, tmp_path, monkeypatch):
    draw(source, documents, monkeypatch, [" "] * 15)
    with pytest.raises(ValueError, match="write some: none of its answers to 5 conversations can be used"):
        answer(source, documents, tmp_path)


@pytest.mark.parametrize("min_p", [0.3, None])
def test_answers_are_drawn_again_with_the_same_seed(source, ended, documents, tmp_path, min_p):
    first, second = (answer(source, documents, tmp_path / name, min_p=min_p) for name in ("a", "b"))
    assert first == second and first[1]["asked"] == 5


def test_answering_resumes_after_the_batches_that_are_there(source, ended, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "SEQUENCES", 2 * ANSWERS)
    whole = answer(source, documents, tmp_path / "whole")
    draw_continuations, calls = answering.draw_continuations, []

    def stop_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw_continuations(*args, **kwargs)

    monkeypatch.setattr(answering, "draw_continuations", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        answer(source, documents, tmp_path / "cut")
    monkeypatch.setattr(answering, "draw_continuations", draw_continuations)
    assert answer(source, documents, tmp_path / "cut") == whole
