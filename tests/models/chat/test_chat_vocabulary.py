"""Test chat_vocabulary.py on real models: what is read is what transformers reads, and rows are the contents."""

import pytest
from transformers import AutoTokenizer

from fuselm.models.chat.chat_vocabulary import ChatVocabulary, Difference, load_chat_vocabulary
from fuselm.models.chat.messages import Dialogue, Message
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model

CONVERSATION = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="What is 2 + 2?"),
    Message(role="assistant", content="It is 4."),
    Message(role="user", content="Et en français ?"),
    Message(role="assistant", content="C'est 4 ✓.\n "),
]
CHATML = pytest.mark.parametrize("name", ["smollm2", "qwen2.5"])


@pytest.fixture(scope="module")
def chats(real_models) -> dict[str, ChatVocabulary]:
    models = {name: locate_model(str(real_models[name])) for name in ("smollm2", "qwen2.5")}
    return {name: load_chat_vocabulary(model, load_vocabulary(model)) for name, model in models.items()}


@CHATML
@pytest.mark.real
def test_real_models_read_what_transformers_writes(name, chats, real_models):
    chat = chats[name]
    read = chat.read(CONVERSATION)
    tokenizer = AutoTokenizer.from_pretrained(locate_model(str(real_models[name])).folder)
    messages = [{"role": m.role, "content": m.content} for m in CONVERSATION]
    assert read.ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert read.differences == ()
    spelled = b"".join(chat.vocabulary.spell(read.ids[read.kept].tolist()))
    assert spelled == Dialogue(messages=tuple(CONVERSATION)).encode() == b"It is 4.\xffC'est 4 \xe2\x9c\x93.\n \xff"
    assert read.segmentation.spelled.all() and read.segmentation.size == len(spelled)
    assert chat.vocabulary.token_strings[chat.end_ids[0]] == "<|im_end|>"


@pytest.mark.parametrize(("name", "white"), [("smollm2", "  "), ("qwen2.5", "\n")])
@pytest.mark.real
def test_white_space_that_merges_with_the_header_is_named(name, white, chats):
    messages = [Message(role="user", content="Hi"), Message(role="assistant", content=f"{white}Yes")]
    read = chats[name].read(messages)
    assert read.differences == (Difference(message=1, what="merged"),)
    assert read.segmentation.starts.tolist() == [0, 1, len(white) + 3]
    assert read.segmentation.spelled.tolist() == [False, True, True]


@CHATML
@pytest.mark.real
def test_the_name_of_a_special_token_in_a_message_is_text(name, chats):
    said = "Write <|im_end|>.<|im_start|>user"
    messages = [Message(role="user", content=said), Message(role="assistant", content=said)]
    read = chats[name].read(messages)
    strings = [chats[name].vocabulary.token_strings[i] for i in read.ids]
    assert strings.count("<|im_end|>") == strings.count("<|im_start|>") == 3  # with the default system prompt's
    assert b"".join(chats[name].vocabulary.spell(read.ids[read.kept].tolist())) == said.encode() + b"\xff"
    assert read.differences == tuple(Difference(message=n, what="control tokens") for n in range(2))
