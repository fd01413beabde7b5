"""Cut a text into pieces that every reader takes whole, in time linear in its length.

A piece is the longest prefix that fits, cut at the coarsest border in its second half. The prefix is found by bisection
over the whole rest of the text, as if each prefix were tokenized. In fact, almost none is: a rest that is far too long,
or a prefix that is far from the limit, is judged by the tokens of one window; a prefix near the limit is judged by the
tokens of its last words. The result is then confirmed by tokenizing it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fuselm.models.vocabulary import Vocabulary

_BORDERS = tuple(re.compile(p) for p in (r"\n\s*\n", r"\n", r"[.!?。！？][\"'”’)\]]*\s", r"\s"))
_CHARACTERS_PER_TOKEN = 4.0  # a guess, until text has been seen
_ANCHOR_REACH = 1000  # characters within which a space between words is searched


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Describe a model by what limits the length of its documents."""

    name: str
    vocabulary: Vocabulary
    max_tokens: int


def cut_text(
    text: str,
    readers: Sequence[Reader],
    max_bytes: int | None = None,
    *,
    advance: Callable[[int], None] = lambda characters: None,
) -> Iterator[str]:
    """Yield pieces of `text` that fit `max_bytes` and all readers; joined again, they are the text.

    `advance` is called with the number of characters of each piece. Raises `ValueError` if a single character does not
    fit.
    """
    counters = [_PrefixCounter(reader) for reader in readers]
    begin = 0
    while True:
        end = begin + _find_piece_length(text, begin, counters, max_bytes)
        yield text[begin:end]
        advance(end - begin)
        if end == len(text):
            return
        begin = end


def _find_piece_length(text: str, begin: int, counters: "Sequence[_PrefixCounter]", max_bytes: int | None) -> int:
    rest = len(text) - begin
    most = rest if max_bytes is None else _count_characters_within(text, begin, max_bytes)
    for counter in counters:
        counter.move_to(text, begin, most)

    def can_all_take(length: int) -> bool:
        return length <= most and all(counter.can_take(length) for counter in counters)

    longest = _find_longest_prefix(can_all_take, rest)
    while not all([counter.confirm(longest) for counter in counters]):
        longest = _find_longest_prefix(can_all_take, rest)
    if longest == rest and can_all_take(rest):
        return rest
    length = find_last_border(text, begin, longest)
    if length == 1 and not can_all_take(1):
        character = text[begin : begin + 1]
        raise ValueError(f"corpus: max_bytes or a model's context is too small for the one character {character!r}")
    return length


def _find_longest_prefix(can_take: Callable[[int], bool], rest: int) -> int:
    """Return the length that bisection finds. If token counts rise and fall with length, it is one of several."""
    if can_take(rest):
        return rest
    low, high = 1, rest  # the longest prefix that fits is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if can_take(middle) else (low, middle)
    return low


def _count_characters_within(text: str, begin: int, max_bytes: int) -> int:
    """Return how many characters of the text from `begin` fit into `max_bytes` bytes."""
    data = text[begin : begin + max_bytes].encode()
    return len(data[:max_bytes].decode(errors="ignore"))


def find_last_border(text: str, begin: int, longest: int) -> int:
    for border in _BORDERS:
        ends = [m.end() for m in border.finditer(text, begin + longest // 2, begin + longest)]
        if ends:
            return ends[-1] - begin
    return longest


class _PrefixCounter:
    """Tell which prefixes of a rest of text a reader takes.

    Two assumptions are made. A text that gets longer has at most `largest_collapse` tokens fewer than before, so a
    window with more than that above the limit is not tokenized further. And the tokens of a prefix are also the first
    tokens of a longer one, except for a few at its end; `confirm` checks this where it matters.
    """

    def __init__(self, reader: Reader):
        self._vocabulary = reader.vocabulary
        self._limit = reader.max_tokens - 1  # one for the context token
        self._slack = reader.vocabulary.largest_collapse
        self._characters_per_token = _CHARACTERS_PER_TOKEN

    def move_to(self, text: str, begin: int, most: int) -> None:
        """Look at prefixes of `text[begin:]` of at most `most` characters from now on."""
        self._text, self._begin, self._most = text, begin, most
        self._exact: dict[int, int] = {}
        self._ends: np.ndarray | None = None
        self._anchor: int | None = None
        self._is_anchored = False  # or it was found that there is no anchor
        self._is_doubted = False
        enough = max(self._limit, 0) + self._slack
        self._window = min(most, int(enough * self._characters_per_token * 1.1) + 1)
        while (count := self._count_window()) < enough and self._window < most:
            self._window = min(most, 2 * self._window)
        self._tokens = self._exact[self._window] = count
        if count:
            self._characters_per_token = self._window / count

    def _count_window(self) -> int:
        if self._window == self._most:  # its tokens may fit, and then it does not matter where they end
            self._ends = None
            return self._count(0, self._window)
        self._find_ends()
        return len(self._ends)

    def can_take(self, length: int) -> bool:
        if length > self._window:
            return False
        if self._tokens + self._slack <= self._limit:
            return True
        if self._is_doubted or length in self._exact:
            return self._count_exactly(length) <= self._limit
        if not self._is_anchored:
            self._find_anchor()
        before = int(np.searchsorted(self._ends, length, "right"))
        if abs(before - self._limit) > self._slack:
            return before < self._limit
        if self._anchor is not None and length > self._anchor + 2:
            return self._count_by_anchor(length) <= self._limit
        return self._count_exactly(length) <= self._limit

    def confirm(self, length: int) -> bool:
        """Return whether `length` and `length + 1` were judged correctly; if not, tokenize everything from here on."""
        if self._is_doubted or self._tokens + self._slack <= self._limit:
            return True
        if self._anchor is not None and length > self._anchor + 2:  # then one check of the sum is enough
            self._is_doubted = self._count_exactly(length) != self._count_by_anchor(length) or (
                length < self._window
                and self.can_take(length + 1)
                != (self._count_by_anchor(length + 1) <= self._limit)  # judged by the window
            )
        else:
            near = [n for n in (length, length + 1) if n < self._window]
            self._is_doubted = any(self.can_take(n) != (self._count_exactly(n) <= self._limit) for n in near)
        return not self._is_doubted

    def _find_ends(self) -> None:
        text = self._text[self._begin : self._begin + self._window]
        self._ends = np.maximum.accumulate(self._vocabulary.find_token_ends(text))

    def _find_anchor(self) -> None:
        """Find a space between words that lies before all lengths in doubt."""
        self._is_anchored = True
        text = self._text[self._begin : self._begin + self._window]
        if self._ends is None:
            self._find_ends()
        if self._limit <= self._slack or len(self._ends) <= self._limit - self._slack:
            return
        high = int(self._ends[self._limit - self._slack]) - 1
        low = max(1, high - _ANCHOR_REACH)
        while high > low and (high := text.rfind(" ", low, high)) > 0:
            is_between_words = text[high - 1].isalnum() and text[high + 1].isalnum()
            if is_between_words and self._ends[np.searchsorted(self._ends, high)] == high:
                self._anchor = high
                self._offset = self._tokens - self._count(high, self._window)
                return

    def _count_by_anchor(self, length: int) -> int:
        """Return the number of tokens up to the anchor plus that of the text from there to `length`."""
        assert self._anchor is not None
        return self._offset + self._count(self._anchor, length)

    def _count(self, begin: int, end: int) -> int:
        return self._vocabulary.count_tokens([self._text[self._begin + begin : self._begin + end]])[0]

    def _count_exactly(self, length: int) -> int:
        if length not in self._exact:
            self._exact[length] = self._count(0, length)
        return self._exact[length]
