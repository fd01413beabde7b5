"""Test that contents are found in the templates of many families, or that what differs is named."""

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_templates import FAMILIES, STRINGS, Family, build_model
from conversation_checks import CHANGES, check_rows
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fuselm.models.chat.chat_vocabulary import ChatVocabulary, load_chat_vocabulary
from fuselm.models.chat.messages import Message
from fuselm.models.chat.template_worker import DATE
from fuselm.models.locating import locate_model

BASES = ["byte_level", "sentence_piece"]
PHASES = [Phase.generate, Phase.shrink]
words = st.sampled_from(
    ["yes", "the cat", "é", "日本", "👩‍👧", "a\nb", "\n\n", "x = 1", "«", "\t", "\u00a0", "0", "…", "e\u0301"]
)
odd = st.sampled_from(["<think>\nhm\n</think>\n\n", "<think>why</think>", "</think>", "User:", "\n\nUser: ", *STRINGS])
white = st.sampled_from(["", "", "", " ", "\n", "  ", "\n\n", "\t", " \n "])
plain = st.tuples(white, st.lists(words, min_size=1, max_size=4), white).map(lambda t: t[0] + " ".join(t[1]) + t[2])
strange = st.lists(st.one_of(words, odd), min_size=1, max_size=4).map(" ".join)
blank = st.sampled_from([" ", "\n", " \n\n"])
contents = st.one_of(plain, plain, strange, st.text(min_size=1, max_size=9), blank)


@st.composite
def dialogues(draw) -> list[Message]:
    """Draw a conversation: maybe a system prompt, then questions and answers; sometimes two questions at once."""
    messages = [Message(role="system", content=draw(plain))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message(role="user", content=draw(contents)) for _ in range(draw(st.sampled_from([1, 1, 1, 2])))]
        messages.append(Message(role="assistant", content=draw(contents)))
    return messages


class SameDay(datetime.datetime):
    """Stand in for the clock of transformers."""

    @classmethod
    def now(cls, tz=None):
        return DATE


@pytest.fixture(autouse=True)
def same_day(monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SameDay)


@pytest.fixture(scope="module")
def bases(byte_level, sentence_piece) -> dict[str, str]:
    return {f.name: Tokenizer.from_file(str(f / "tokenizer.json")).to_str() for f in (byte_level, sentence_piece)}


@pytest.fixture(scope="module")
def chats(bases, tmp_path_factory) -> dict[tuple[str, str], tuple[ChatVocabulary, PreTrainedTokenizerFast]]:
    loaded = {}
    for (name, family), base in itertools.product(FAMILIES.items(), BASES):
        folder = tmp_path_factory.mktemp("families") / name
        model, vocabulary = build_model(family, bases[base], folder)
        loaded[name, base] = load_chat_vocabulary(model, vocabulary), load_theirs(family, folder)
    return loaded


def load_theirs(family: Family, folder: Path) -> PreTrainedTokenizerFast:
    named = {f"{n}_token": t for n, t in (("bos", family.bos), ("eos", family.eos)) if t}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)


def adapt(family: Family, messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return what a family's template reads: no system role where it knows none, and neighbours as one message."""
    messages = list(messages)
    if not family.knows_system and messages[0].role == "system":
        first = replace(messages[1], content=f"{messages[0].content}\n\n{messages[1].content}")
        messages[:2] = [first]
    if family.alternates:
        grouped = [list(group) for _, group in itertools.groupby(messages, lambda m: m.role)]
        messages = [replace(group[0], content="\n\n".join(m.content for m in group)) for group in grouped]
    return [{"role": m.role, "content": m.content} for m in messages]


def render(theirs: PreTrainedTokenizerFast, family: Family, messages: Sequence[Message], *, tokenize: bool):
    rows = adapt(family, messages)
    if family is FAMILIES["parts"]:
        rows = [{**row, "content": [{"type": "text", "text": row["content"]}]} for row in rows]
    return theirs.apply_chat_template(rows, chat_template=family.text, tokenize=tokenize, return_dict=False)


def check_conversation(
    family: Family, chat: ChatVocabulary, theirs: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> None:
    read = chat.read(messages)
    check_rows(chat, read, messages)
    named = {d.what for d in read.differences}
    own = {d.message for d in read.differences if d.what in CHANGES}
    text = render(theirs, family, messages, tokenize=False)
    for n, message in enumerate(messages):
        if message.role == "assistant" and message.content not in text:
            assert n in own, (message.content, text)
    if "control tokens" not in named:
        expected = render(theirs, family, messages, tokenize=True)
        ids = read.ids.tolist()
        assert ids[: len(expected)] == expected
        assert len(ids) == len(expected) + ("end added" in named)
        if "{% generation %}" in family.text:
            masks = theirs.apply_chat_template(
                adapt(family, messages),
                chat_template=family.text,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            flags = np.array(masks["assistant_masks"], bool)
            assert not (flags & ~read.assistant).any()
            left_out = np.flatnonzero(read.assistant & ~flags)  # where the last character of a block has two tokens
            assert not len(left_out) or (
                chat.vocabulary.word_mark == "▁" and not np.roll(read.assistant, -1)[left_out].any()
            )
        else:
            assert (read.assistant == read.kept).all()
    is_system_moved = not family.knows_system and messages[0].role == "system"
    assert ("system in user" in named) == is_system_moved
    neighbours = any(a.role == b.role for a, b in itertools.pairwise(messages))
    assert ("roles merged" in named) == (family.alternates and neighbours)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_contents_are_found_or_differences_named(name, base, chats):
    chat, theirs = chats[name, base]

    @settings(max_examples=20, suppress_health_check=list(HealthCheck), database=None, phases=PHASES)
    @given(messages=dialogues())
    def check(messages):
        check_conversation(FAMILIES[name], chat, theirs, messages)

    check()


FEW = ("llama2", "llama3.1", "mistral-v3", "phi3", "qwen3", "smollm3", "glm4", "command-r")
REAL = [("smollm2", name) for name in FEW] + [("qwen2.5", "qwen3")]


@pytest.mark.real
@pytest.mark.parametrize(("base", "name"), REAL)
def test_contents_are_found_by_tokenizers_of_real_models(base, name, real_models, tmp_path):
    tokenizer = (locate_model(str(real_models[base])).folder / "tokenizer.json").read_text(encoding="utf-8")
    model, vocabulary = build_model(FAMILIES[name], tokenizer, tmp_path / name)
    chat, theirs = load_chat_vocabulary(model, vocabulary), load_theirs(FAMILIES[name], model.folder)

    @settings(max_examples=10, suppress_health_check=list(HealthCheck), database=None, phases=PHASES)
    @given(messages=dialogues())
    def check(messages):
        check_conversation(FAMILIES[name], chat, theirs, messages)

    check()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_ends_with_the_token_that_ends_it(name, base, chats):
    family, (chat, _) = FAMILIES[name], chats[name, base]
    messages = [Message(role=role, content=c) for role, c in [("user", "a"), ("assistant", "b")] * 2]
    read = chat.read(messages)
    ends = [chat.vocabulary.token_strings[turn.segmentation.ids[-1]] for turn in read.turns]
    if family.end is not None:
        assert ends == [family.end, family.end]
        assert {d.what for d in read.differences} <= set()
        assert chat.vocabulary.token_strings[chat.end_ids[0]] == family.end
    assert all(chat.vocabulary.token_bytes[i] == b"\xff" for i in chat.end_ids)
    strings = [chat.vocabulary.token_strings[i] for i in chat.end_ids]
    assert set(family.ends or (family.eos,)) <= set(strings)
