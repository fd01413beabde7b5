"""Hold conversations as messages, and the bytes of what the assistant says in them.

These bytes, the response bytes, are the same for every model, whatever its template: each response, followed by the
byte `END_OF_TURN`, which no text has in UTF-8.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

END_OF_TURN = b"\xff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Hold one message of a conversation. `extra` has the row's other fields, such as `tool_calls`, for templates.

    An assistant's message is a response, which models are compared and trained on, if it has content, calls no tool
    and has no `weight` of 0, which is OpenAI's mark of a message that is context alone. A response whose
    `is_unfinished` is set was cut, so its turn does not end.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    is_unfinished: bool = False

    @property
    def is_response(self) -> bool:
        """Tell whether models are compared and trained on this message."""
        is_context = self.extra.get("weight", 1) == 0 or self.extra.get("tool_calls")
        return self.role == "assistant" and bool(self.content) and not is_context

    def as_row(self) -> dict[str, Any]:
        """Return the message as a JSON object in OpenAI's form."""
        row = {"role": self.role, "content": self.content, **self.extra}
        return row | ({"is_unfinished": True} if self.is_unfinished else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """Hold a conversation: its messages, and the tools that templates may describe.

    It stands where a document has its text. `encode` returns its response bytes, as `str.encode` returns those of a
    text.

    >>> from fuselm.models.chat.messages import Dialogue, Message
    >>> asked, answered = Message(role="user", content="2 + 2?"), Message(role="assistant", content="4")
    >>> Dialogue(messages=(asked, answered)).encode()
    b'4\\xff'
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def responses(self) -> list[Message]:
        """Return the messages that models are compared and trained on."""
        return [message for message in self.messages if message.is_response]

    def encode(self) -> bytes:
        """Return the bytes of all responses, each followed by `END_OF_TURN` if its turn ends."""
        return b"".join(m.content.encode() + (b"" if m.is_unfinished else END_OF_TURN) for m in self.responses)

    def count_bytes(self) -> int:
        """Count the bytes of all contents, those of context among them."""
        return sum(len(message.content.encode()) for message in self.messages)

    def as_row(self) -> dict[str, Any]:
        """Return the conversation as a row of a file."""
        return {"messages": [m.as_row() for m in self.messages]} | ({"tools": list(self.tools)} if self.tools else {})

    def spell_whole(self) -> str:
        """Return everything in the conversation as one line, which differs for conversations that differ."""
        return json.dumps(self.as_row(), ensure_ascii=False, sort_keys=True)


def read_dialogue(row: Mapping[str, Any]) -> Dialogue:
    """Return the conversation that `Dialogue.as_row` wrote."""
    fields = ("role", "content", "is_unfinished")
    messages = [
        Message(
            role=m["role"],
            content=m["content"],
            extra={name: value for name, value in m.items() if name not in fields},
            is_unfinished=m.get("is_unfinished", False),
        )
        for m in row["messages"]
    ]
    return Dialogue(messages=tuple(messages), tools=tuple(row.get("tools", ())))
