"""sampling.py: a source's texts are made of the tokens that were drawn from its distribution."""

import io
import itertools
from dataclasses import replace

import chat_models
import numpy as np
import pytest
import torch
from rich.console import Console

from fuselm.documents.corpus import Document
from fuselm.models.chat.dialogue_reading import add_chat_template
from fuselm.models.chat.messages import END_OF_TURN, Dialogue, Message
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model
from fuselm.sources import capture, sampling
from fuselm.sources.answer_choice import split_last_response
from fuselm.system.progress import Progress


@pytest.fixture
def source(byte_level):
    model = locate_model(str(byte_level))
    return capture.load_source(model, load_vocabulary(model), dtype="float32")


def documents(texts: list[str | Dialogue]) -> list[Document]:
    return [
        Document(id=f"{n}", origin=f"{n}", domain=f"d{n % 2}", split="train", text=text) for n, text in enumerate(texts)
    ]


def sample(source, texts: list[str | Dialogue], *, tokens: int = 5 * sampling.LENGTH, seed: int = 0):
    progress = Progress(Console(file=io.StringIO()), "draw")
    return sampling.sample_texts(source, documents(texts), tokens=tokens, seed=seed, progress=progress)


LONG = [f"the {n} words of a document, which has more tokens than a prompt takes; number {n}" * 3 for n in range(5)]


def test_texts_continue_documents_and_their_tokens_spell_them(source):
    texts = sample(source, LONG)
    assert {text.document.domain for text in texts} == {"d0", "d1"}
    for text in texts:
        data, segmentation = text.document.text.encode(), text.segmentation
        spelled = b"".join(source.vocabulary.token_bytes[i] for i in segmentation.ids)
        assert spelled == data and segmentation.size == len(data)
        original = LONG[int(text.document.origin)].encode()
        assert data[: text.begin] == original[: text.begin]
        assert (segmentation.starts == text.begin).sum() == 1 and len(segmentation.ids) > sampling.PROMPT


def test_the_same_seed_draws_the_same_texts(source):
    first, second, other = (sample(source, LONG, seed=seed) for seed in (0, 0, 1))
    assert [t.document for t in first] == [t.document for t in second] != [t.document for t in other]


def test_short_documents_leave_texts_to_the_context_token(source):
    assert all(text.begin == 0 for text in sample(source, ["short", "too"]))


def test_tokens_come_as_often_as_the_source_expects(source):
    """Draw the first token after one prompt many times; a random model's texts may be no longer."""
    ids = source.vocabulary.segment(LONG[0]).ids[: sampling.PROMPT].tolist()
    with torch.no_grad():
        inputs = torch.tensor([[source.context_token, *ids]])
        logits = source.model(inputs).logits[0, -1, : source.vocabulary.size].double().clone()
    logits[[i for i, b in enumerate(source.vocabulary.token_bytes) if not b]] = -torch.inf
    expected = logits.softmax(0).numpy()
    source.model.generation_config = replace_length(sampling._make_generation_config(source))
    torch.manual_seed(0)
    count = 2000
    drawn = np.array(
        [
            row[0]
            for row in sampling._generate(
                source, [[source.context_token, *ids]] * count, Progress(Console(quiet=True), "")
            )
        ]
    )
    found = np.bincount(drawn, minlength=len(expected))
    assert found[expected == 0].sum() == 0
    spread = (found - count * expected)[expected > 0] ** 2 / (count * expected[expected > 0])
    assert spread.sum() < (expected > 0).sum() + 6 * np.sqrt(2 * (expected > 0).sum())  # chi-squared


def replace_length(settings):
    settings.max_new_tokens = 1
    return settings


def test_a_source_with_a_short_context_cannot_write(source):
    assert sampling.can_sample(source)
    assert not sampling.can_sample(replace(source, context_length=sampling.PROMPT + sampling.LENGTH))


def test_progress_counts_each_token_while_a_batch_is_drawn(source):
    steps = []

    class Counting(Progress):
        def advance(self, amount: int, note: str = "") -> None:
            steps.append(amount)

    shown = Counting(Console(quiet=True), "")
    sampling.sample_texts(source, documents(LONG), tokens=3 * sampling.LENGTH, seed=0, progress=shown)
    assert steps == [3] * sampling.LENGTH


# ---- conversations


@pytest.fixture
def talker(byte_level, tmp_path):
    model = locate_model(str(chat_models.add_template(byte_level, tmp_path / "talker")))
    return capture.load_source(model, add_chat_template(model, load_vocabulary(model)), dtype="float32")


def make_talk(answers: list[str]) -> Dialogue:
    pairs = [(Message(role="user", content="So?"), Message(role="assistant", content=said)) for said in answers]
    return Dialogue(messages=tuple(itertools.chain(*pairs)))


def test_answers_continue_the_last_response_behind_all_that_was_said(talker):
    talks = [make_talk(["Well.", "the words of an answer, which go on for a while"]), make_talk(["short"])]
    texts = sample(talker, talks)
    assert len(texts) == 5
    for text in texts:
        original, said = talks[int(text.document.origin)], text.document.text
        assert said.messages[:-1] == tuple(split_last_response(original)[0])
        data, segmentation = said.encode(), text.segmentation
        assert b"".join(talker.vocabulary.token_bytes[i] for i in segmentation.ids) == data
        assert (
            0 < text.begin < len(data) and data[: text.begin] == original.responses[-1].content.encode()[: text.begin]
        )
        assert (segmentation.starts == text.begin).sum() == 1 and segmentation.size == len(data)
        read = talker.vocabulary.segment(said).reading
        first = int(np.argmax(read.kept))
        assert segmentation.reading.first == read.first
        assert np.array_equal(segmentation.reading.ids[:first], read.ids[:first])
        assert np.array_equal(segmentation.reading.kept[:first], read.kept[:first])
        assert np.array_equal(segmentation.reading.ids[segmentation.reading.kept], segmentation.ids)


def test_an_answer_stops_where_the_source_ends_its_turn(talker):
    (end,) = [i for i, spelled in enumerate(talker.vocabulary.token_bytes) if spelled == END_OF_TURN]
    asked = documents([make_talk(["one two three four"])])[0]
    prompt = sampling._begin_response(talker, asked)
    word = talker.vocabulary.segment("words").ids.tolist()
    space = talker.vocabulary.segment("x \n").ids.tolist()[1:]
    ended = sampling._cut_response(talker, prompt, [*word, end, *word])
    assert ended.document.text.encode().endswith(b"words\xff") and not ended.document.text.messages[-1].is_unfinished
    cut = sampling._cut_response(talker, prompt, [*word, *space, end])  # a template may trim this
    assert cut.document.text.encode().endswith(b"words") and cut.document.text.messages[-1].is_unfinished
    assert sampling._cut_response(talker, prompt, space) is None


def test_texts_beside_conversations_have_no_end_of_a_turn(talker):
    texts = sample(talker, [*LONG, make_talk(["the words of an answer, which go on"])], tokens=12 * sampling.LENGTH)
    kinds = [isinstance(text.document.text, Dialogue) for text in texts]
    assert 1 <= kinds.count(True) <= 2  # one of 6 documents, so 2 of 12, unless nothing of one can be used
    plain = [text.segmentation.ids for text, is_talk in zip(texts, kinds, strict=True) if not is_talk]
    assert not any(talker.vocabulary.token_bytes[i] == END_OF_TURN for ids in plain for i in ids)
