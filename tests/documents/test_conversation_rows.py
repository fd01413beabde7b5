"""conversation_rows.py: the forms in which people have conversations, and what is wrong with a row in one line."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest

from fuselm.documents.texts import TextRow, read_texts
from fuselm.models.chat.messages import Dialogue, Message, read_dialogue

ASKED, SAID = Message(role="user", content="2 + 2?"), Message(role="assistant", content="4")
SYSTEM = Message(role="system", content="Be brief.")
PLAIN = Dialogue(messages=(ASKED, SAID))
CALL = [{"id": "a", "type": "function", "function": {"name": "add", "arguments": {"x": 2, "y": 2}}}]
MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
FORMS = {
    "openai": {"messages": MESSAGES},
    "openai in parts": {"messages": [MESSAGES[0] | {"content": [{"type": "text", "text": "2 + 2?"}]}, MESSAGES[1]]},
    "openai as JSON": {"messages": json.dumps(MESSAGES)},
    "sharegpt": {"conversations": SHAREGPT},
    "openai under sharegpt's name": {"conversations": MESSAGES},
    "prompt": {"prompt": "2 + 2?", "completion": "4"},
    "trl": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "alpaca": {"instruction": "2 + 2?", "input": "", "output": "4"},
    "alpaca without input": {"instruction": "2 + 2?", "output": "4"},
    "text is empty": {"text": "", "prompt": "2 + 2?", "completion": "4"},
}


def write(folder: Path, *rows: dict, name: str = "rows.jsonl") -> Path:
    file = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read(folder: Path, *rows: dict, **options) -> list:
    return [row.text for row in read_texts(write(folder, *rows), **options)]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_conversation(tmp_path, form):
    assert read(tmp_path, FORMS[form]) == [PLAIN]


@pytest.mark.parametrize("form", ["openai", "sharegpt", "prompt", "trl", "alpaca"])
def test_parquet_holds_the_same_conversations(tmp_path, form):
    file = write(tmp_path, FORMS[form] | {"domain": "sums", "id": 7}, name="rows.parquet")
    assert list(read_texts(file)) == [TextRow(domain="sums", text=PLAIN)]


def test_nulls_that_a_table_fills_in_are_absent(tmp_path):
    other = [{"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": "4"}, MESSAGES[1]]
    file = write(tmp_path, {"messages": MESSAGES}, {"messages": [MESSAGES[0], *other]}, name="rows.parquet")
    plain, called = [row.text for row in read_texts(file)]
    assert plain == PLAIN
    assert called.messages[1].extra["tool_calls"] == CALL
    assert called.encode() == b"4\xff"  # a call of a tool is context


def test_texts_and_conversations_are_mixed(tmp_path):
    assert read(tmp_path, {"text": "a text"}, {"messages": MESSAGES}) == ["a text", PLAIN]


def test_a_text_comes_before_a_conversation_unless_columns_name_that(tmp_path):
    row = {"text": "a text", "messages": MESSAGES}
    assert read(tmp_path, row) == ["a text"]
    assert read(tmp_path, row, columns={"messages": "messages"}) == [PLAIN]


def test_fields_of_conversations_may_have_other_names(tmp_path):
    columns = {"prompt": "question", "completion": "answer"}
    assert read(tmp_path, {"question": "2 + 2?", "answer": "4"}, columns=columns) == [PLAIN]


def test_alpacas_input_follows_the_instruction(tmp_path):
    (dialogue,) = read(tmp_path, {"instruction": "Add.", "input": "2 and 2", "output": "4"})
    assert dialogue.messages[0].content == "Add.\n\n2 and 2"


def test_a_system_field_begins_the_conversation(tmp_path):
    expected = Dialogue(messages=(SYSTEM, ASKED, SAID))
    assert read(tmp_path, {"system": "Be brief.", "conversations": SHAREGPT}) == [expected]
    (own,) = read(tmp_path, {"system": "another", "messages": [SYSTEM.as_row(), *MESSAGES]})
    assert own == expected


def test_messages_of_weight_0_and_those_of_a_prompt_are_context(tmp_path):
    told = {"role": "assistant", "content": "5"}
    wrong = {"role": "user", "content": "Wrong."}
    by_weight = [MESSAGES[0], told | {"weight": 0}, wrong, MESSAGES[1] | {"weight": 1}]
    first, second = read(
        tmp_path, {"messages": by_weight}, {"prompt": [MESSAGES[0], told, wrong], "completion": [MESSAGES[1]]}
    )
    assert first.encode() == second.encode() == b"4\xff"


def test_what_follows_the_last_response_is_dropped(tmp_path):
    assert read(tmp_path, {"messages": [*MESSAGES, {"role": "user", "content": "Thanks"}]}) == [PLAIN]


def test_response_bytes_are_the_contents_each_with_an_end():
    dialogue = Dialogue(messages=(SYSTEM, ASKED, SAID, ASKED, Message(role="assistant", content="vier é")))
    assert dialogue.encode() == b"4\xff" + "vier é".encode() + b"\xff"
    cut = Dialogue(messages=(ASKED, Message(role="assistant", content="4 as", is_unfinished=True)))
    assert cut.encode() == b"4 as"


@pytest.mark.parametrize("form", ["openai", "alpaca"])
def test_a_conversation_is_written_and_read(tmp_path, form):
    (dialogue,) = read(tmp_path, FORMS[form] | {"tools": [{"type": "function", "function": {"name": "add"}}]})
    assert read_dialogue(json.loads(json.dumps(dialogue.as_row()))) == dialogue


BAD = {
    "no turn of the assistant to learn from; drop": {"messages": MESSAGES[:1]},
    "message 2, from the assistant, is empty; drop the row": {
        "messages": [MESSAGES[0], MESSAGES[1] | {"content": " "}]
    },
    "message 1, from the user, is empty; drop the row": {"prompt": "", "completion": "4"},
    "'messages': message 1 has the role 'bot'; needed is one of": {"messages": [{"role": "bot", "content": "a"}]},
    "'messages': message 1 has no 'role'; each needs a 'role' and a 'content'": {"messages": ["a"]},
    "'messages': message 1 has 'from' in place of 'role'; name the field 'conversations'": {"messages": SHAREGPT},
    "'messages' is no list": {"messages": 7},
    "no turn of the assistant to learn from": {"messages": []},
    "'messages' is a string that is no JSON; it needs to be a list": {"messages": "hello"},
    "'messages': message 1 has a part of type 'image_url'; only text is read": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    },
    "'conversations': turn 1 is from 'alien'; needed is one of": {"conversations": [{"from": "alien", "value": "a"}]},
    "'conversations': turn 1 has no 'value' string": {"conversations": [{"from": "human"}]},
    "'output' is no text": {"instruction": "a", "output": 7},
    "'messages' is null, so there is no conversation; drop the row": {"messages": None, "domain": "a"},
    "'completion' is null, so there is no conversation; drop the row": {"prompt": "a", "completion": None},
    "message 2 has half of a surrogate pair": {"prompt": "a", "completion": "\ud800"},
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_row_is_refused_with_its_line_or_skipped(tmp_path, problem):
    file = write(tmp_path, FORMS["openai"], BAD[problem])
    with pytest.raises(ValueError) as caught:
        list(read_texts(file))
    assert str(caught.value).startswith(f"{file}:2: {problem}")
    skipped: list[str] = []
    assert [row.text for row in read_texts(file, skip=skipped.append)] == [PLAIN]
    assert skipped == [str(caught.value)]
