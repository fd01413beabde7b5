"""Find where a template put the assistants' contents, by comparing what it writes with and without them.

Two renderings, one with a word of ours in place of every content, usually tell everything: what stands around the words
is the template's, and the conversation is that text with the contents in it. Where the template changed a content, or
did something else because of it, each content is replaced alone.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EXACT, TRIMMED, DROPPED, REWRITTEN, MISSING = "exact", "trimmed", "dropped", "rewritten", "missing"
# Contents of conversations in; texts, or why there is none, out.
Render = Callable[[Sequence[Sequence[str]]], Sequence[str | ValueError]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Say that `size` characters of a content, from `content` on, are those of the rendered text from `rendered` on."""

    content: int
    rendered: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Say where a content is in a rendered text: between `begin` and `end`, and which pieces are there as they were."""

    begin: int
    end: int
    how: str
    pieces: tuple[Piece, ...]


def find_contents(contents: Sequence[str], wanted: Sequence[int], render: Render) -> tuple[str, list[Placed]]:
    """Render a conversation, and find the contents of the `wanted` messages in it.

    `render` takes the contents of all messages. Raises what it raises for the conversation as it is.
    """
    words = [f"Qz{n}jx{n}Zq" for n in range(len(contents))]
    words = [word if not any(word in content for content in contents) else word + "w" * 9 for word in words]
    replaced = [words[n] if n in set(wanted) else content for n, content in enumerate(contents)]
    text, other = render([contents, replaced])
    if isinstance(text, ValueError):
        raise text
    around = None if isinstance(other, ValueError) else _split(other, [words[n] for n in wanted])
    if around is not None and (found := _interleave(text, around, [contents[n] for n in wanted])):
        return text, found
    return text, [_find_alone(text, contents, n, words[n], render) for n in wanted]


def _split(text: str, words: Sequence[str]) -> list[str] | None:
    """Return what stands before, between and behind the words; None unless each occurs once, in this order."""
    around = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            return None
        around.append(before)
    return [*around, text]


def _interleave(text: str, around: Sequence[str], contents: Sequence[str]) -> list[Placed] | None:
    """Find contents, whole or without white space at their ends, between what stands around them."""
    if not text.startswith(around[0]):
        return None
    position, found = len(around[0]), []
    for content, behind in zip(contents, around[1:], strict=True):
        for form in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
            if text.startswith(form + behind, position):
                break
        else:
            return None
        found.append(_place(content, form, position))
        position += len(form) + len(behind)
    return found if position == len(text) else None


def _place(content: str, form: str, position: int) -> Placed:
    offset = content.find(form)
    how = EXACT if form == content else TRIMMED if form else MISSING
    pieces = (Piece(content=offset, rendered=position, size=len(form)),) if form else ()
    return Placed(begin=position, end=position + len(form), how=how, pieces=pieces)


def _find_alone(text: str, contents: Sequence[str], n: int, word: str, render: Render) -> Placed:
    """Find one content, by what is written with another in its place."""
    content = contents[n]
    other = render([[*contents[:n], word, *contents[n + 1 :]]])[0]
    before, found, behind = ("", "", "") if isinstance(other, ValueError) else other.partition(word)
    if not found or word in behind:
        position = text.find(content) if content and text.count(content) == 1 else -1
        if position < 0:
            return Placed(begin=len(text), end=len(text), how=MISSING, pieces=())
        return _place(content, content, position)
    begin = _count_common(text, before)
    end = len(text) - _count_common(text[begin:][::-1], behind[::-1])
    return _compare(text, begin, end, content, len(before))


def _compare(text: str, begin: int, end: int, content: str, expected: int) -> Placed:
    """Find which pieces of a content stand between `begin` and `end`; `expected` is where it would begin unchanged."""
    for form in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
        if form and text.endswith(form, 0, end):
            return _place(content, form, end - len(form))
    region = text[begin:end]
    stripped = region.strip()
    if not stripped:
        return Placed(begin=end, end=end, how=MISSING, pieces=())
    for form in (region, region.lstrip(), region.rstrip(), stripped):
        if form in content:  # reasoning was dropped, say
            at = begin + region.find(form)
            offset = content.rfind(form)
            piece = Piece(content=offset, rendered=at, size=len(form))
            return Placed(begin=at, end=at + len(form), how=DROPPED, pieces=(piece,))
    tail = _count_common(region[::-1].lstrip(), content[::-1].lstrip())
    head = _count_common(region, content) if begin == expected else 0
    head = max(min(head, len(content) - tail, len(region) - tail), 0)
    region_end, content_end = len(region.rstrip()), len(content.rstrip())
    pieces = [Piece(content=0, rendered=begin, size=head)] if head else []
    if tail:
        pieces.append(Piece(content=content_end - tail, rendered=begin + region_end - tail, size=tail))
    if 2 * (head + tail) < len(stripped):
        pieces = []
    return Placed(begin=begin, end=end, how=REWRITTEN, pieces=tuple(pieces))


def _count_common(one: str, other: str) -> int:
    """Return how many characters both begin with."""
    if other.startswith(one) or one.startswith(other):
        return min(len(one), len(other))
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
