"""Make questions with known answers from documents of one domain; they depend on nothing else.

`cloze` asks for the last word of a sentence or line, given all the document before it, as LAMBADA does.
`continuation` asks which of four texts comes next: the document's own, or one of three that come after the same word in
other documents, so that grammar alone does not tell.
"""

import itertools
import random
import re
from collections.abc import Iterable, Sequence

from fuselm.documents.corpus import Document

CLOZE, CONTINUATION = 150, 100  # questions of a domain at most; those of the second are read four times
BEFORE = 120  # characters of the document before the answer, at least
TOLD = 100  # of them that `continuation` tells; with three times as many a small model is right nine times of ten
LENGTH = 40  # bytes of a continuation, at most

_LAST_WORD = re.compile(r"(?<=\S) ([^\W\d_]{4,})(?=[.!?…]|\W*(?:\n|\Z))")
_PLACE = re.compile(r"(\S+) (?=\w)")


def cloze(documents: Sequence[Document]) -> list[dict]:
    """Return items with the `document`, the `context`, and the `word` that comes after it and a space."""

    def ask(document: Document) -> list[dict]:
        found = _LAST_WORD.finditer(document.text, BEFORE)
        return [{"document": document.origin, "context": document.text[: m.start()], "word": m[1]} for m in found]

    return _choose(map(ask, documents), CLOZE)


def continuation(documents: Sequence[Document]) -> list[dict]:
    """Return items with the `document`, the `context`, four `choices` after a space, and the index `gold`."""
    places = {d.id: [m for m in _PLACE.finditer(d.text, BEFORE) if _has(d.text, m.end())] for d in documents}
    after: dict[str, list[tuple[str, str]]] = {}
    for d in documents:
        for m in places[d.id]:
            after.setdefault(m[1], []).append((d.origin, _next(d.text, m.end())))

    def ask(document: Document) -> list[dict]:
        items = []
        for m in places[document.id]:
            own = _next(document.text, m.end())
            chance = random.Random(f"{m.end()} {document.text}")
            others = {o: text for o, text in chance.sample(after[m[1]], len(after[m[1]])) if o != document.origin}
            wrong = [text for text in dict.fromkeys(others.values()) if text != own][:3]
            if len(wrong) == 3:
                choices = chance.sample([own, *wrong], 4)
                told = _told(document.text[: m.end() - 1])
                items.append(
                    {"document": document.origin, "context": told, "choices": choices, "gold": choices.index(own)}
                )
        return items

    return _choose(map(ask, documents), CONTINUATION)


def _has(text: str, at: int) -> bool:
    """Tell whether a whole continuation comes there."""
    return len(text[at:].encode()) > LENGTH


def _next(text: str, at: int) -> str:
    """Return the whole words that fit into a continuation, or the first word if it does not fit."""
    fitting = text[at:].encode()[: LENGTH + 1].decode(errors="ignore")
    whole = re.match(r"(?s).*\S(?=\s)", fitting)
    return whole[0] if whole else re.match(r"\S+", text[at:])[0]


def _told(before: str) -> str:
    """Return the last whole words before a continuation, which a model is given."""
    return re.sub(r"\A\S*\s+", "", before[-TOLD - 1 :])


def _choose(of_documents: Iterable[list[dict]], count: int) -> list[dict]:
    """Choose so many of all items, from each document in turn, in the order of the documents."""
    shuffled = [random.Random(items[0]["context"]).sample(items, len(items)) for items in of_documents if items]
    in_turn = [item for turn in itertools.zip_longest(*shuffled) for item in turn if item is not None]
    chosen = {id(item) for item in in_turn[:count]}
    return [item for items in shuffled for item in items if id(item) in chosen]
