"""Test how chat_vocabulary.py reads system prompts, tools, reasoning, models without a template and what ends turns."""

import json
from pathlib import Path

import pytest
from chat_templates import FAMILIES, Family, build_model
from tokenizers import Tokenizer

from fuselm.models.chat import templates
from fuselm.models.chat.chat_vocabulary import ChatVocabulary, Conversation, load_chat_vocabulary
from fuselm.models.chat.messages import Message

CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": "<|im_end|>"}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def base(byte_level) -> str:
    return Tokenizer.from_file(str(byte_level / "tokenizer.json")).to_str()


@pytest.fixture
def load(base, tmp_path):
    def load_family(family: Family | str, **options) -> ChatVocabulary:
        family = FAMILIES[family] if isinstance(family, str) else family
        model, vocabulary = build_model(family, base, tmp_path / f"model{len(list(tmp_path.iterdir()))}")
        return load_chat_vocabulary(model, vocabulary, **options)

    return load_family


def talk(*contents: str) -> list[Message]:
    return [Message(role=("user", "assistant")[n % 2], content=c) for n, c in enumerate(contents)]


def show(chat: ChatVocabulary, read: Conversation, *, context: bool = True) -> str:
    """Return what is read, with special tokens by name; the kept tokens are in braces."""
    shown = []
    for i, is_kept in zip(read.ids.tolist(), read.kept, strict=True):
        spelled = chat.vocabulary.token_bytes[i]
        string = chat.vocabulary.token_strings[i]
        text = string if spelled in (None, b"\xff") else spelled.decode("utf-8", "replace")
        shown += [f"{{{text}}}"] if is_kept else [text] if context else []
    return "".join(shown).replace("}{", "")


def named(read: Conversation) -> list[tuple[int | None, str]]:
    return [(d.message, d.what) for d in read.differences]


# ---- system prompts


def test_a_models_own_system_prompt_stands_in_front_of_the_conversations(load):
    chat = load("chatml", system="Be kind.")
    asked = talk("Hi", "Yes")
    assert show(chat, chat.read(asked)).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi")
    with_own = [Message(role="system", content="Be brief."), *asked]
    read = chat.read(with_own)
    assert show(chat, read).startswith("<|im_start|>system\nBe kind.\n\nBe brief.<|im_end|>\n")
    assert named(read) == [] and read.turns[0].message == 2
    assert chat.fingerprint != load("chatml").fingerprint == load("chatml").fingerprint


def test_a_default_system_prompt_is_context_and_can_be_emptied(load):
    assert "You are helpful." in show(load("smollm2"), load("smollm2").read(talk("Hi", "Yes")))
    chat = load("smollm2", system="")
    assert show(chat, chat.read(talk("Hi", "Yes"))).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi")


def test_a_template_without_a_system_role_reads_the_prompt_before_the_first_question(load):
    chat = load("gemma2", system="Be kind.")
    read = chat.read(talk("Hi", "Yes"))
    assert show(chat, read).startswith("<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>")
    assert named(read) == [(None, "system in user")]


def test_neighbours_of_one_role_are_joined_where_roles_have_to_alternate(load):
    chat = load("mistral-v3")
    messages = [*talk("Hi", "Yes"), Message(role="user", content="And"), *talk("now?", "No")]
    read = chat.read(messages)
    assert "[INST] And\n\nnow?[/INST]" in show(chat, read)
    assert named(read) == [(None, "roles merged")] and [t.message for t in read.turns] == [1, 4]
    with pytest.raises(ValueError, match=r"chat template refuses the conversation \(roles must alternate\); leave the"):
        chat.read([*talk("Hi", "Yes"), *talk("Hi", "Yes")[1:]])


# ---- what is said


def test_only_what_a_message_says_is_kept(load):
    chat = load("qwen2.5")
    assert show(chat, chat.read(talk("Hi", "Yes", "So?", "No")), context=False) == "{Yes<|im_end|>No<|im_end|>}"
    context = [*talk("Hi"), Message(role="assistant", content="old", extra={"weight": 0}), *talk("So?", "No")]
    assert show(chat, chat.read(context), context=False) == "{No<|im_end|>}"


def test_reasoning_that_a_template_drops_is_named_and_the_answer_is_kept(load):
    chat = load("deepseek-r1")
    read = chat.read(talk("Hi", "<think>\nhm\n</think>\n\nYes, it is"))
    assert named(read) == [(1, "dropped")]
    assert show(chat, read, context=False) == "{\n\nYes, it is<｜end▁of▁sentence｜>}"
    own = read.segmentation
    assert own.starts[0] == 0 and not own.spelled[0] and own.spelled[1:].all() and own.size == 32


def test_a_template_that_drops_earlier_reasoning_keeps_the_last(load):
    chat = load("qwen3")
    thought = "<think>\nhm\n</think>\n\nYes"
    read = chat.read(talk("Hi", thought, "So?", thought))
    assert named(read) == [(1, "dropped")]
    assert show(chat, read, context=False) == "{Yes<|im_end|><think>\nhm\n</think>\n\nYes<|im_end|>}"


def test_tool_calls_are_context_and_their_results_too(load):
    messages = [
        *talk("2 + 2?"),
        Message(role="assistant", content="", extra={"tool_calls": [CALL]}),
        Message(role="tool", content="4 <|im_end|>", extra={"name": "add"}),
        Message(role="assistant", content="It is 4."),
    ]
    chat = load("qwen2.5")
    read = chat.read(messages, TOOLS)
    shown = show(chat, read)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "<|im_end|>"}}\n</tool_call><|im_end|>' in shown
    assert (
        shown.startswith('<|im_start|>system\nTools:\n{"type": "function"') and shown.count("{It is 4.<|im_end|>}") == 1
    )
    assert list(read.ids).count(chat.end_ids[0]) == 5  # those in tool calls and results are text
    chat = load("mistral-v1")
    read = chat.read(messages)
    assert {what for _, what in named(read)} == {"tool as user"}
    assert show(chat, read, context=False) == "{ It is 4.</s>}"


# ---- the ends of turns


def test_several_ends_are_one_event(load):
    chat = load("llama3")
    strings = [chat.vocabulary.token_strings[i] for i in chat.end_ids]
    assert strings == ["<|eot_id|>", "<|end_of_text|>"]
    assert [i for i, b in enumerate(chat.vocabulary.token_bytes) if b == b"\xff"] == sorted(chat.end_ids)
    assert chat.vocabulary.id_by_bytes[b"\xff"] == chat.end_ids[0]
    assert chat.vocabulary.encode_bytes([b"\xff"]) == [(chat.end_ids[0],)]
    assert chat.vocabulary.merges.byte_ids[0xFF] == chat.end_ids[0]


def test_a_template_may_end_the_last_turn_with_another_token(load):
    chat = load("gpt-oss")
    assert show(chat, chat.read(talk("Hi", "Yes", "So?", "No")), context=False) == "{Yes<|end|>No<|return|>}"


def test_a_token_that_begins_the_next_message_ends_a_turn_if_the_model_stops_at_it(load):
    chat = load("glm4")
    read = chat.read(talk("Hi", "Yes", "So?", "No"))
    assert show(chat, read, context=False) == "{Yes<|user|>No<|user|>}" and named(read) == [(3, "end added")]
    read = load("falcon3").read(talk("Hi", "Yes", "So?", "No"))
    assert named(read) == [(1, "no end")] and read.segmentation.spelled.tolist()[-1]


def test_an_end_is_put_where_a_template_writes_nothing(load):
    chat = load("solar")
    read = chat.read(talk("Hi", "Yes"))
    assert show(chat, read).endswith("### Assistant:\n{Yes</s>}") and named(read) == [(1, "end added")]


# ---- models without a template


def write(folder: Path, **settings) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def test_a_model_without_a_template_is_refused_or_reads_another(base, tmp_path):
    model, vocabulary = build_model(FAMILIES["zephyr"], base, tmp_path / "base")
    write(model.folder, bos_token="<s>", eos_token="</s>")
    with pytest.raises(
        ValueError, match=r"base: has no chat template, so it reads no conversations; set chat.template"
    ):
        load_chat_vocabulary(model, vocabulary)
    with pytest.raises(ValueError, match=r"chat.template 'chatml': unknown; needs one of plain, or a template's text"):
        load_chat_vocabulary(model, vocabulary, template="chatml")
    chat = load_chat_vocabulary(model, vocabulary, template="plain")
    assert show(chat, chat.read(talk("Hi", "Yes"))) == "<s>User:\nHi\n\nAssistant:\n{Yes</s>}\n\n"
    chat = load_chat_vocabulary(model, vocabulary, template=FAMILIES["mistral-v3"].text)
    assert show(chat, chat.read(talk("Hi", "Yes"))) == "<s>[INST] Hi[/INST] {Yes</s>}"  # BOS is there once


def test_templates_are_found_wherever_a_model_has_them(base, tmp_path):
    model, _ = build_model(FAMILIES["chatml"], base, tmp_path / "model")
    named = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    write(model.folder, chat_template=named, eos_token={"content": "<|im_end|>"}, bos_token=None)
    found = templates.find_template(model.folder)
    assert (found.text, found.with_tools, found.names) == ("{{ 1 }}", "{{ 2 }}", {"eos_token": "<|im_end|>"})
    (model.folder / "chat_template.jinja").write_text("{{ 3 }}", encoding="utf-8")
    assert templates.find_template(model.folder, "plain").text == "{{ 3 }}"
    write(model.folder, chat_template=3)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template is a int, needs a string; correct it"):
        templates.find_template(model.folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('never') }}", "refuses a question and its answer .*never.*; correct it"),
        ("{{ 'nothing' }}", "its chat template does not write what messages say, in their order; correct it"),
        ("{% if %}", "refuses a question and its answer .*Expected an expression"),
    ],
)
def test_a_template_that_is_none_is_refused(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(Family(text=text, special=("</s>",)))


def test_a_conversation_without_an_answer_is_refused(load):
    with pytest.raises(ValueError, match="a conversation has nothing that the assistant says; leave it out"):
        load("chatml").read(talk("Hi"))
