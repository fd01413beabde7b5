"""Read rows of conversations as people have them: OpenAI's, ShareGPT's, prompts with completions, Alpaca's.

A row is a conversation if it has `messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`.
docs/how-to/chat.md describes the forms.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fuselm.models.chat.messages import Dialogue, Message

# The fields of each form, the one that makes a row a conversation of this form first.
FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "completion": ("completion", "prompt"),
    "output": ("output", "instruction", "input"),
}
FIELDS = tuple(field for fields in FORMS.values() for field in fields)
BESIDE = ("tools", "system")  # fields of a row that a conversation takes, under these names
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


class BadRow(ValueError):
    """Tell that a row is no conversation that can be used; a run file may say that such rows are skipped."""


def find_form(record: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """Return the form, a key of `FORMS`, that a row is a conversation of; None if it is none.

    `names` says which fields of the row stand for those of the forms.
    """
    for form, fields in FORMS.items():
        if record.get(names.get(form, form)) is None:
            continue
        needed = [record.get(names.get(field, field)) for field in fields if field != "input"]
        if any(value != "" for value in needed) and all(value is not None for value in needed):
            return form
    return None


def parse_conversation(record: Mapping[str, Any], names: Mapping[str, str], form: str) -> Dialogue:
    """Return a row of that form as a conversation. Raises `BadRow` if it cannot be used."""
    value = {field: record.get(names.get(field, field)) for field in FORMS[form]}
    name = {field: names.get(field, field) for field in FORMS[form]}
    if form == "messages":
        messages = _parse_messages(value["messages"], name["messages"])
    elif form == "conversations":
        messages = _parse_sharegpt(value["conversations"], name["conversations"])
    elif form == "completion":
        messages = _parse_completion(value["prompt"], value["completion"], name)
    else:
        messages = _parse_alpaca(value, name)
    system = record.get("system")
    if isinstance(system, str) and system.strip() and not any(m.role in ("system", "developer") for m in messages):
        messages = [Message(role="system", content=system), *messages]
    _check_messages(messages)
    last = max((n for n, message in enumerate(messages) if message.is_response), default=None)
    if last is None:
        raise BadRow("no turn of the assistant to learn from; drop the row")
    return Dialogue(messages=tuple(messages[: last + 1]), tools=_parse_tools(record.get("tools")))


def _parse_messages(value: Any, name: str) -> list[Message]:
    return [_parse_message(m, f"'{name}'", n) for n, m in enumerate(_read_list(value, name), 1)]


def _parse_message(message: Any, where: str, number: int) -> Message:
    """Return a message in OpenAI's form. Fields that are null count as absent, as columns of tables have them."""
    if not isinstance(message, Mapping) or not isinstance(role := message.get("role"), str):
        if isinstance(message, Mapping) and "from" in message:
            raise BadRow(f"{where}: message {number} has 'from' in place of 'role'; name the field 'conversations'")
        raise BadRow(f"{where}: message {number} has no 'role'; each needs a 'role' and a 'content'")
    if role == "function":
        role = "tool"
    if role not in ROLES:
        raise BadRow(f"{where}: message {number} has the role {role!r:.40}; needed is one of {', '.join(ROLES)}")
    given = message.get("content")
    content = _join_parts(given, where, number) if isinstance(given, list | tuple) else given
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"{where}: the content of message {number} is no text")
    rest = {k: _drop_nulls(v) for k, v in message.items() if k not in ("role", "content") and v is not None}
    extra = {name: value for name, value in rest.items() if name != "tool_calls" or value}
    return Message(role=role, content=content, extra=extra)


def _join_parts(parts: Sequence[Any], where: str, number: int) -> str:
    """Return the text of a content that is given in parts, as OpenAI's form allows."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(f"{where}: message {number} has a part of type {kind!r:.40}; only text is read")
    return "".join(part["text"] for part in parts)


def _drop_nulls(value: Any) -> Any:
    """Return nested values without nulls: tables fill every field that another row has."""
    if isinstance(value, Mapping):
        return {name: _drop_nulls(of) for name, of in value.items() if of is not None}
    if isinstance(value, list | tuple):
        return [_drop_nulls(of) for of in value]
    return value


def _parse_sharegpt(value: Any, name: str) -> list[Message]:
    messages = []
    for number, turn in enumerate(_read_list(value, name), 1):
        if isinstance(turn, Mapping) and "role" in turn and "from" not in turn:
            messages.append(_parse_message(turn, f"'{name}'", number))
            continue
        if not isinstance(turn, Mapping) or not isinstance(said := turn.get("value"), str):
            raise BadRow(f"'{name}': turn {number} has no 'value' string; each needs 'from' and 'value'")
        if (role := SHAREGPT_ROLES.get(str(turn.get("from")))) is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise BadRow(f"'{name}': turn {number} is from {turn.get('from')!r:.40}; needed is one of {known}")
        extra = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
        messages.append(Message(role=role, content=said, extra=extra))
    return messages


def _parse_completion(prompt: Any, completion: Any, name: Mapping[str, str]) -> list[Message]:
    """Return a prompt and its completion; either may be a text, or a list of messages as in TRL.

    An assistant's messages in a prompt are context.
    """
    if isinstance(prompt, str):
        messages = [Message(role="user", content=prompt)]
    else:
        messages = [
            Message(
                role=m.role, content=m.content, extra={**m.extra, "weight": 0} if m.role == "assistant" else m.extra
            )
            for m in _parse_messages(prompt, name["prompt"])
        ]
    if isinstance(completion, str):
        return [*messages, Message(role="assistant", content=completion)]
    return messages + _parse_messages(completion, name["completion"])


def _parse_alpaca(value: Mapping[str, Any], name: Mapping[str, str]) -> list[Message]:
    for field in ("instruction", "output"):
        if not isinstance(value[field], str):
            raise BadRow(f"'{name[field]}' is no text")
    given = value["input"]
    if given is not None and not isinstance(given, str):
        raise BadRow(f"'{name['input']}' is no text")
    asked = value["instruction"] + (f"\n\n{given}" if given and given.strip() else "")
    return [Message(role="user", content=asked), Message(role="assistant", content=value["output"])]


def _parse_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    if value is None or value == "":
        return ()
    tools = _drop_nulls(_read_list(value, "tools"))
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("'tools' is no list of objects")
    return tuple(tools)


def _read_list(value: Any, name: str) -> list[Any]:
    """Return a list that is given as such, or as JSON in a string, as tables have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"'{name}' is a string that is no JSON; it needs to be a list") from None
    if not isinstance(value, list | tuple):
        raise BadRow(f"'{name}' is no list")
    return list(value)


def _check_messages(messages: Sequence[Message]) -> None:
    """Raise `BadRow` if something that is said is empty or no text."""
    for number, message in enumerate(messages, 1):
        try:
            message.content.encode()
        except UnicodeEncodeError:
            raise BadRow(f"message {number} has half of a surrogate pair, which is no text; fix or drop it") from None
        if not message.content.strip() and not message.extra.get("tool_calls") and message.role != "tool":
            raise BadRow(f"message {number}, from the {message.role}, is empty; drop the row")
