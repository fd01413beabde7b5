"""dialogue_cutting.py and corpus.py: long conversations are cut between turns, and kept apart by split."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fuselm.documents import corpus, document_list, document_writing
from fuselm.documents.cutting import Reader
from fuselm.documents.dialogue_cutting import cut_dialogue, split_exchanges
from fuselm.models.chat.messages import Dialogue, Message
from fuselm.models.segmentation import Reading, Segmentation
from fuselm.models.vocabulary import Vocabulary

SYSTEM = Message(role="system", content="Be brief.")


def count_words(dialogue: Dialogue) -> int:
    """Count the tokens of a stand-in for templates: each word of a message, and its role."""
    return sum(1 + len(message.content.split()) for message in dialogue.messages)


def read_words(dialogue: Dialogue, refused: str) -> Segmentation:
    if refused and any(refused in message.content for message in dialogue.messages):
        raise ValueError("the template refuses it")
    count = count_words(dialogue)
    kept = np.arange(count) == count - 1  # one token spells all responses
    return Segmentation(
        ids=np.zeros(1, np.int32),
        starts=np.zeros(1, np.int32),
        spelled=np.ones(1, bool),
        size=len(dialogue.encode()),
        reading=Reading(first=0, ids=np.zeros(count, np.int32), kept=kept),
    )


def make(turns: int, words: int = 5) -> Dialogue:
    messages = [SYSTEM]
    for n in range(turns):
        messages.append(Message(role="user", content=f"question {n}"))
        messages.append(Message(role="assistant", content=" ".join(f"word{n}" for _ in range(words))))
    return Dialogue(messages=tuple(messages))


def reader(most: int, refused: str = "") -> Reader:
    vocabulary = Vocabulary(Tokenizer(WordLevel({"a": 0}, unk_token="a")), 1)
    vocabulary.read_dialogue = partial(read_words, refused=refused)
    return Reader(name="words", vocabulary=vocabulary, max_tokens=most)


def test_a_conversation_that_fits_stays_as_it_is():
    assert list(cut_dialogue(make(3), [reader(1000)], 10_000)) == [make(3)]


@pytest.mark.parametrize("most", [20, 25, 31, 40])
def test_every_response_is_learned_once_and_every_piece_fits(most):
    whole = make(7)
    pieces = list(cut_dialogue(whole, [reader(most)]))
    assert len(pieces) > 1
    assert [m for piece in pieces for m in piece.responses] == whole.responses
    assert all(piece.messages[0] == SYSTEM for piece in pieces)
    assert all(count_words(piece) < most for piece in pieces)


def test_later_pieces_begin_with_what_was_said_before():
    *_, last = cut_dialogue(make(7), [reader(40)])
    context = [m for m in last.messages if m.role == "assistant" and not m.is_response]
    assert context
    assert all(m.extra["weight"] == 0 for m in context)


def test_a_response_that_does_not_fit_is_shortened_and_its_turn_does_not_end():
    (piece,) = cut_dialogue(make(1, words=50), [reader(30)])
    (response,) = piece.responses
    assert response.is_unfinished
    assert make(1, words=50).responses[0].content.startswith(response.content)
    assert not piece.encode().endswith(b"\xff")


def test_a_question_that_does_not_fit_leaves_nothing():
    long = Dialogue(messages=(Message(role="user", content="why " * 50), Message(role="assistant", content="so")))
    assert list(cut_dialogue(long, [reader(30)])) == []


def test_calls_of_tools_stay_with_their_question():
    call = Message(role="assistant", content="", extra={"tool_calls": [{"id": "a"}]})
    messages = (*make(1).messages[1:2], call, Message(role="tool", content="4"), *make(2).messages[2:])
    head, exchanges = split_exchanges((SYSTEM, *messages))
    assert head == [SYSTEM]
    assert [len(exchange) for exchange in exchanges] == [4, 2]


def prepare(folder: Path, rows: list[dict], **options) -> dict:
    file = tiny_run.write_rows(folder / "rows.jsonl", rows)
    readers = options.pop("readers", [reader(1000)])
    return corpus.prepare_corpus(
        [file], folder, domains=["rows"], readers=readers, max_bytes=4096, dev=0.2, heldout=0.2, share=1.0, seed=0,
        progress=tiny_run.QUIET, **options,
    )  # fmt: skip


def make_row(n: int, **fields: str) -> dict:
    return {"messages": [m.as_row() for m in make(1 + n).messages], **fields}


def test_a_corpus_keeps_conversations_and_counts_them(tmp_path):
    counts = prepare(tmp_path, [make_row(n) for n in range(7)])
    documents = document_list.read_documents(tmp_path)
    assert counts["dialogues"] == len(documents) == 7
    assert {document.text for document in documents if isinstance(document.text, str)} == set()
    assert make(3) in [document.text for document in documents]
    assert "text" not in json.loads((tmp_path / document_writing.ONE_PART).read_text().splitlines()[0])
    assert counts["bytes"]["train"] == sum(len(d.text.encode()) for d in documents if d.split == "train")


def test_the_same_conversation_is_not_trained_on_if_it_is_held_out(tmp_path):
    rows = [make_row(n, split=split) for n, split in enumerate(("train", "train", "dev", "heldout"))]
    counts = prepare(tmp_path, [*rows, make_row(3, split="train")])
    assert counts["repeated"] == 1


def test_a_conversation_that_a_template_refuses_is_named_or_skipped(tmp_path):
    rows, picky = [make_row(n) for n in range(6)], [reader(1000, refused="question 5")]
    with pytest.raises(ValueError, match=r"rows.jsonl:6: the template refuses it"):
        prepare(tmp_path, rows, readers=picky)
    assert prepare(tmp_path, rows, readers=picky, skip_bad=True)["bad"] == 1
