"""turns.py: a conversation is aligned response by response, and the end of a turn to the end of a turn."""

from dataclasses import replace
from pathlib import Path

import chat_models
import numpy as np
import pytest
from captures import source_of

from fuselm.alignment import span
from fuselm.alignment.aligner import METHODS, Aligner
from fuselm.alignment.turns import pair_turns
from fuselm.documents.corpus import Document
from fuselm.models.chat.dialogue_reading import add_chat_template
from fuselm.models.chat.messages import END_OF_TURN, Dialogue, Message
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model
from fuselm.models.segmentation import split_turns
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources import capture
from fuselm.stores.retention import Policy
from fuselm.stores.store import Trace

WHOLE = Policy(policy="top_k", top_k=10_000)


def load(folder: Path) -> Vocabulary:
    located = locate_model(str(folder))
    return add_chat_template(located, load_vocabulary(located))


@pytest.fixture(scope="module")
def folders(byte_level, sentence_piece, tmp_path_factory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("models")
    return (
        chat_models.add_template(sentence_piece, out / "source", chat_models.BRACKETS),
        chat_models.add_template(byte_level, out / "target", chat_models.LINES),
    )


@pytest.fixture(scope="module")
def vocabularies(folders) -> tuple[Vocabulary, Vocabulary]:
    return load(folders[0]), load(folders[1])


@pytest.fixture(scope="module")
def dialogue(texts) -> Dialogue:
    said = (texts[0]["text"][:71].strip(), "Ünïcödé – né!", texts[3]["text"][:53].strip())
    messages = [m for s in said for m in (Message(role="user", content="?"), Message(role="assistant", content=s))]
    return Dialogue(messages=tuple(messages))


@pytest.fixture(scope="module")
def trace(folders, vocabularies, dialogue) -> Trace:
    source = replace(source_of(folders[0]), vocabulary=vocabularies[0])
    document = Document(id="a", origin="a", domain="a", split="train", text=dialogue)
    return next(capture.trace_batch(source, [document], [source.vocabulary.segment(dialogue)], policy=WHOLE))


def test_turns_are_texts_of_their_own(vocabularies, dialogue, trace):
    source, target = vocabularies
    turns = list(pair_turns(source, target, trace, target.segment(dialogue), dialogue.encode()))
    assert b"".join(turn.data for turn in turns) == dialogue.encode()
    assert [turn.data for turn in turns] == [m.content.encode() + END_OF_TURN for m in dialogue.responses]
    for turn in turns:
        assert b"".join(s or b"" for s in target.spell(turn.target.ids.tolist())) == turn.data
        space = b" " if turn.trace.starts[0] < 0 else b""  # the template writes one, which may be in the first token
        assert b"".join(s or b"" for s in source.spell(turn.trace.tokens.tolist())) == space + turn.data
    assert [turn.trace.starts[0] < 0 for turn in turns] == [True, False, True]


def test_a_later_turn_may_begin_with_a_space_of_the_template():
    strings = [b" Hi", b"\xff", b" Yo", b"u", b"\xff"]
    first, second = split_turns(strings, np.array([-1, 2, 3, 5, 6], np.int32), b"Hi\xffYou\xff")
    assert (first.starts.tolist(), first.data) == ([-1, 2], b"Hi\xff")
    assert (second.starts.tolist(), second.data, second.tokens) == ([-1, 2, 3], b"You\xff", slice(2, 5))


def test_span_follows_each_response_by_itself(vocabularies, dialogue, trace):
    source, target = vocabularies
    aligner = Aligner(source, target, top_k=10_000, method="span")
    gold = aligner.align(trace, dialogue).distributions.gold
    for turn in pair_turns(source, target, trace, target.segment(dialogue), dialogue.encode()):
        parts = (turn.trace, turn.target, turn.data)
        alone, _ = span.follow_text(source, target, aligner.spelling, *parts, 10_000)
        assert np.array_equal(alone.gold, gold[turn.tokens])
        assert alone.gold.sum() >= turn.trace.distributions.gold.sum() - 1e-2  # its end included


def target_ends(target: Vocabulary, aligned: Trace) -> np.ndarray:
    return np.array([target.token_bytes[i] == END_OF_TURN for i in aligned.tokens.tolist()])


@pytest.mark.parametrize("method", METHODS)
def test_an_end_is_aligned_to_an_end_by_every_method(vocabularies, dialogue, trace, method):
    source, target = vocabularies
    aligner = Aligner(source, target, method=method, top_k=10_000, texts=[dialogue])
    aligned = aligner.align(trace, dialogue)
    ends = np.flatnonzero(target_ends(target, aligned))
    own_ends = np.flatnonzero([source.token_bytes[i] == END_OF_TURN for i in trace.tokens.tolist()])
    assert len(ends) == len(own_ends) == 3
    assert aligned.distributions.informed[ends].all()
    if method == "exact":
        assert np.allclose(aligned.distributions.gold[ends], trace.distributions.gold[own_ends], atol=1e-3)


def test_a_model_of_the_same_tokens_and_ends_keeps_its_rows(vocabularies, folders, dialogue):
    target = vocabularies[1]
    source = replace(source_of(folders[1]), vocabulary=target)
    document = Document(id="a", origin="a", domain="a", split="train", text=dialogue)
    own = next(capture.trace_batch(source, [document], [target.segment(dialogue)], policy=WHOLE))
    assert Aligner(target, load(folders[1]), method="span").align(own, dialogue) is own
