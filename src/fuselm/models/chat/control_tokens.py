"""Turn a rendered conversation into tokens, where a template's special tokens are tokens and a message's are text.

A message may contain `<|im_end|>`, as a page about chat models does. It must not end the turn. So such strings are
hidden while a template renders, and what the template itself writes is given names that no message has, under which
the tokenizer knows its special tokens. Everything else is as if the tokenizer read the whole text at once.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray
from tokenizers import AddedToken, Tokenizer

from fuselm.models import segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.system.errors import name_tokenizer_errors

_FIRST_BRACKET = 0x10FF00  # characters for private use that write names; messages that have them get others
_BRACKET_PAIRS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """Hold the tokens of a rendered text: `begins` and `ends` are the bytes of `data`, the text, that each covers.

    A token begins a byte early where the tokenizer puts a space of its own before it. `controls` tells which are
    special tokens that the template wrote.
    """

    data: bytes
    ids: Int[ndarray, "tokens"]
    begins: Int[ndarray, "tokens"]
    ends: Int[ndarray, "tokens"]
    controls: Bool[ndarray, "tokens"]

    @property
    def own_begins(self) -> Int[ndarray, "tokens"]:
        """Return where each token begins, without a space that the tokenizer put before it."""
        return np.maximum(self.begins, np.append(0, self.ends)[:-1])


class ControlTokens:
    """Know the strings that are special tokens when a template writes them, and text when a message does."""

    def __init__(self, vocabulary: Vocabulary, pipeline: str, strings: Mapping[str, int]):
        self._vocabulary = vocabulary
        self._pipeline = pipeline
        self.ids = dict(strings)
        ordered = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._strings = ordered
        self._numbers = {string: n for n, string in enumerate(ordered)}
        self._tokenizers: dict[int, tuple[Tokenizer, dict[int, int]]] = {}

    def hide(self, value: Any, brackets: int) -> Any:
        """Replace strings of control tokens within a message, however deep, by names that a template leaves alone."""
        if isinstance(value, str):
            return self._pattern.sub(lambda m: self._name("T", self._numbers[m[0]], brackets), value)
        if isinstance(value, Mapping):
            return {key: self.hide(item, brackets) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item, brackets) for item in value]
        return value

    def contains(self, text: str) -> bool:
        """Tell whether a text has the string of a control token."""
        return self._pattern.search(text) is not None

    def choose_brackets(self, messages: Any) -> int:
        """Return a number of characters for private use that no message has."""
        text = json.dumps(messages, ensure_ascii=False)
        for pair in range(_BRACKET_PAIRS):
            if chr(_FIRST_BRACKET + 2 * pair) not in text:
                return pair
        raise ValueError("a message has all of the characters from U+10FF00 to U+10FFC6; remove them")

    def finish(self, rendered: str, brackets: int) -> str:
        """Give a part of a rendered text its final form: control tokens by name, and the strings of messages again."""
        named = self._pattern.sub(lambda m: self._name("C", self._numbers[m[0]], brackets), rendered)
        return self._hidden(brackets).sub(lambda m: self._strings[int(m[1])], named)

    def reveal(self, rendered: str, brackets: int) -> str:
        """Return a part of a rendered text as a reader sees it."""
        return self._hidden(brackets).sub(lambda m: self._strings[int(m[1])], rendered)

    def encode(self, text: str, brackets: int) -> EncodedText:
        """Return the tokens of a finished text."""
        tokenizer, aliases = self._load_tokenizer(brackets)
        with name_tokenizer_errors():
            encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        controls = [n for n, i in enumerate(ids) if i in aliases]
        begins, ends = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        first = character = byte = 0
        for n in [*controls, len(ids)]:
            until = offsets[n][0] if n < len(ids) else len(text)
            part, size = text[character:until], 0
            if n > first or part:
                size = self._place(part, ids[first:n], offsets[first:n], character, begins[first:n], ends[first:n])
            begins[first:n] += byte
            ends[first:n] += byte
            byte += size
            if n < len(ids):
                behind = offsets[n + 1][0] if n + 1 < len(ids) else len(text)  # the token may claim white space that
                character, first = max(until, min(offsets[n][1], behind)), n + 1  # others read
                begins[n] = byte
                byte += len(text[until:character].encode())
                ends[n] = byte
        numbers = np.array([aliases.get(i, i) for i in ids], np.int32)
        is_control = np.zeros(len(ids), bool)
        is_control[controls] = True
        return EncodedText(data=text.encode(), ids=numbers, begins=begins, ends=ends, controls=is_control)

    def _place(
        self,
        part: str,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        character: int,
        begins: ndarray,
        ends: ndarray,
    ) -> int:
        """Write where the tokens of a part without control tokens begin and end; return its bytes."""
        within = [(a - character, b - character) for a, b in offsets]
        found = segmentation.segment(part, ids, self._vocabulary.spell(ids), within)
        begins[:], ends[:] = found.starts, found.ends
        return found.size

    def _name(self, kind: str, number: int, brackets: int) -> str:
        return f"{chr(_FIRST_BRACKET + 2 * brackets)}{kind}{number}{chr(_FIRST_BRACKET + 2 * brackets + 1)}"

    def _hidden(self, brackets: int) -> re.Pattern[str]:
        return re.compile(f"{chr(_FIRST_BRACKET + 2 * brackets)}T([0-9]+){chr(_FIRST_BRACKET + 2 * brackets + 1)}")

    def _load_tokenizer(self, brackets: int) -> tuple[Tokenizer, dict[int, int]]:
        """Return a tokenizer that knows control tokens by their names only, and the ids that those stand for."""
        if brackets not in self._tokenizers:
            pipeline = json.loads(self._pipeline)
            flags = {added["content"]: added for added in pipeline["added_tokens"]}
            for string in self.ids:
                flags[string]["special"] = True  # its own string is text
            tokenizer = Tokenizer.from_str(json.dumps(pipeline))
            tokenizer.encode_special_tokens = True
            names = {self._name("C", n, brackets): string for n, string in enumerate(self._strings)}
            tokenizer.add_tokens(
                [
                    AddedToken(
                        name,
                        special=False,
                        **{k: flags[s][k] for k in ("single_word", "lstrip", "rstrip", "normalized")},
                    )
                    for name, s in names.items()
                ]
            )
            self._tokenizers[brackets] = tokenizer, {tokenizer.token_to_id(n): self.ids[s] for n, s in names.items()}
        return self._tokenizers[brackets]


def list_added_tokens(pipeline: str) -> Iterable[dict[str, Any]]:
    """Return a tokenizer's added tokens, as its JSON describes them."""
    return json.loads(pipeline)["added_tokens"]
