"""Define a document: a piece of text or a conversation that every model reads whole, and its line in a file."""

import json
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any

from fuselm.models.chat.messages import Dialogue, read_dialogue

SPLITS = ("train", "dev", "heldout")
_NAMES = ("id", "origin", "domain", "split")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Hold a piece of text, or a conversation, that every model reads whole.

    Pieces of one document share one `origin`.
    """

    id: str
    origin: str
    domain: str
    split: str
    text: str | Dialogue

    def as_row(self) -> dict[str, Any]:
        """Return the document as a JSON object; a conversation has `messages` in place of `text`."""
        row: dict[str, Any] = {name: getattr(self, name) for name in _NAMES}
        return row | ({"text": self.text} if isinstance(self.text, str) else self.text.as_row())

    def as_line(self) -> bytes:
        """Return the document as the line of a file of documents."""
        if not isinstance(self.text, str):
            return (json.dumps(self.as_row(), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        fields = ", ".join([f'"{name}": {encode_basestring(getattr(self, name))}' for name in (*_NAMES, "text")])
        return f"{{{fields}}}\n".encode("utf-8", "backslashreplace")  # as `json.dumps`, in half the time


def parse_line(line: bytes) -> Document:
    """Return the document of a line. Raises `ValueError`, `TypeError` or `KeyError` if it is no such line."""
    row = json.loads(line)
    if "messages" not in row:
        return Document(**row)
    return Document(**{name: row[name] for name in _NAMES}, text=read_dialogue(row))
