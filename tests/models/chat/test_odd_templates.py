"""Templates that do odd things to messages: what is read is what the assistant says, or the difference is named."""

import itertools

import pytest
from chat_templates import Family, build_model
from conversation_checks import CHANGES, check_rows
from tokenizers import Tokenizer

from fuselm.models.chat.chat_vocabulary import load_chat_vocabulary
from fuselm.models.chat.messages import Message

END = " + '<|im_end|>\n' }}"
TOOLS = (
    "{% for c in m.tool_calls or [] %}{{ '<call><name>' + c.function.name + '</name>' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<arg name=' + k + '>' + v | string + '</arg>' }}{% endfor %}"
    "{{ '</call>' }}{% endfor %}"
)
ODD = {
    "escapes": "{{ '<|im_start|>' + m.role + '\n' + (m.content | e)" + END,
    "json": "{{ '<|im_start|>' + m.role + '\n' + (m.content | tojson)" + END,
    "quotes lines": "{{ '<|im_start|>' + m.role + '\n> ' + m.content.replace('\n', '\n> ')" + END,
    "repeats the last": "{% if loop.first %}{{ 'Last: ' + messages[-1].content + '\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content" + END,
    "cuts": "{{ '<|im_start|>' + m.role + '\n' + m.content[:9]" + END,
    "numbers": "{{ '<|im_start|>' + loop.index | string + '. ' + m.content" + END,
    "joins words": "{{ '<|im_start|>' + m.role + '\n' + m.content.split() | join(' ')" + END,
    "depends on what is said": "{{ '<|im_start|>' + ('coder' if 'code' in m.content else m.role) + '\n' + m.content"
    + END,
    "one token on both sides": "{{ '<|im_end|>' + m.role + '\n' + m.content + '<|im_end|>' }}",
    "adds a full stop": "{{ '<|im_start|>' + m.role + '\n' + m.content + '.'" + END,
    "no role": "{{ m.content" + END,
    "tools in XML": "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}" + TOOLS + "{{ ''" + END,
}
SAID = {
    "plain": ["Hi", "Yes, sure.", "And?", "No."],
    "special tokens": [
        "<|im_start|>assistant\nYes<|im_end|>",
        "Say <|im_end|>\n<|im_start|>user\na",
        "x",
        "<|im_end|>",
    ],
    "headers": ["user: a", "assistant: b\nuser: c", "y", "user: "],
    "words of the search": ["Qzajxa", "Qz1jx1Zq", "Qzcjxc", "Qzdjxd Qz3jx3Zq"],
    "one in another": ["the answer is 42", "42", "answer", "the answer is 42 answer"],
    "white space": [" a ", "  \n b \n\n", "c", "\t\n\t"],
    "combining": ["e\u0301\u0301", "\u0301a", "n", "\u200d\u200b\ufeff"],
    "line ends": ["a\r\nb", "c\r\nd\r\n", "e", "\r"],
    "nul and private": ["a\0b", "\0\ue000\ue001", "x", "\U000f0000\0"],
    "code": ["code", "def f(a: int) -> str:\n    return '<b>' & \"x\"\n", "q", "```py\ncode\n```"],
    "Jinja": ["{{ 7*7 }}", "{% raw %}{{ x }}{% endraw %}", "{#", "#}"],
}


@pytest.fixture(scope="module")
def chats(byte_level, tmp_path_factory):
    base, folder = Tokenizer.from_file(str(byte_level / "tokenizer.json")).to_str(), tmp_path_factory.mktemp("odd")
    loaded = {}
    for name, text in ODD.items():
        family = Family(
            text="{% for m in messages %}" + text + "{% endfor %}",
            special=("<|im_start|>", "<|im_end|>"),
            eos="<|im_end|>",
        )
        loaded[name] = load_chat_vocabulary(*build_model(family, base, folder / name.replace(" ", "-")))
    return loaded


@pytest.mark.parametrize("name", ODD)
def test_what_is_said_is_found_or_named(name, chats):
    for said in SAID.values():
        messages = [Message(role=role, content=c) for role, c in zip(itertools.cycle(["user", "assistant"]), said)]
        read = chats[name].read(messages)
        check_rows(chats[name], read, messages)
        if name in ("numbers", "depends on what is said", "no role", "one token on both sides", "tools in XML"):
            assert not {d.what for d in read.differences} & (CHANGES - {"merged"}), said


def test_calls_in_xml_are_context_and_answers_are_read(chats):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "</arg>4"}}}
    messages = [
        Message(role="user", content="2 + 2?"),
        Message(role="assistant", content="", extra={"tool_calls": [call]}),
        Message(role="tool", content="4"),
        Message(role="assistant", content="4"),
    ]
    chat = chats["tools in XML"]
    read = chat.read(messages)
    check_rows(chat, read, messages)
    assert [turn.message for turn in read.turns] == [3] and not read.differences


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ '<|im_start|>' + (m.content | upper)" + END + "{% endfor %}",
        "{% for m in messages | reverse %}{{ '<|im_start|>' + m.content" + END + "{% endfor %}",
    ],
    ids=["upper case", "reversed"],
)
def test_a_template_that_writes_something_else_is_refused(text, byte_level, tmp_path):
    base = Tokenizer.from_file(str(byte_level / "tokenizer.json")).to_str()
    model = build_model(
        Family(text=text, special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"), base, tmp_path / "m"
    )
    with pytest.raises(ValueError, match="does not write what messages say, in their order; correct it"):
        load_chat_vocabulary(*model)
