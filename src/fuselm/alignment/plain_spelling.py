"""Tokenize many strings at once by compiled merges, where no pre-tokenizer cuts them."""

import itertools
import re
from typing import no_type_check

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from fuselm.models import bpe
from fuselm.models.vocabulary import Vocabulary
from fuselm.system.compiling import compiled

# A word in lower case, except for its first letter, with or without a space before it: ASCII and Latin-1.
PLAIN = re.compile(rb" ?(?:[A-Za-z]|\xc3[\x80-\x96\x98-\xb6\xb8-\xbf])(?:[a-z]|\xc3[\x9f-\xb6\xb8-\xbf])*")
CHECKED = 256  # strings on which a tokenizer is compared with its merges


class PlainSpeller:
    """Tokenize as a vocabulary's `encode_bytes` does, and faster where it is BPE and the string is a plain word."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._merges = vocabulary.merges if _agrees_on_words(vocabulary) else None

    def spell(self, strings: list[bytes]) -> list[tuple[int, ...]]:
        """Return the tokens of each string; `UNMAPPED` ends those of a string that tokens do not spell."""
        if self._merges is None:
            return self._vocabulary.encode_bytes(strings)
        is_plain = [PLAIN.fullmatch(s) is not None for s in strings]
        words = iter(spell_words(self._merges, [s for s, plain in zip(strings, is_plain, strict=True) if plain]))
        others = iter(
            self._vocabulary.encode_bytes([s for s, plain in zip(strings, is_plain, strict=True) if not plain])
        )
        return [next(words if plain else others) for plain in is_plain]


def _agrees_on_words(vocabulary: Vocabulary) -> bool:
    """Tell whether the tokenizer splits words as its merges alone do."""
    if vocabulary.merges is None:
        return False
    words = [b for b in vocabulary.token_bytes if b and PLAIN.fullmatch(b)]
    ends = [b for b in words if b[:1] != b" " and b[:1].islower()]
    if not ends:
        return False
    step = max(len(words) // CHECKED, 1)
    strings = [word + ends[n * 7919 % len(ends)] for n, word in enumerate(words[::step])]
    return spell_words(vocabulary.merges, strings) == vocabulary.encode_bytes(strings)


def spell_words(merges: bpe.Merges, words: list[bytes]) -> list[tuple[int, ...]]:
    """Return the tokens of each string by merges alone."""
    if not words:
        return []
    edges = np.append(0, np.cumsum([len(w) for w in words])).astype(np.int64)
    tokens, first = _spell_packed(merges, np.frombuffer(b"".join(words), np.uint8), edges)
    listed, at = tokens.tolist(), first.tolist()
    return [tuple(listed[a:b]) for a, b in itertools.pairwise(at)]


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _spell_packed(
    merges: bpe.Merges, packed: UInt8[ndarray, "bytes"], edges: Int[ndarray, "words+1"]
) -> tuple[Int[ndarray, "_"], Int[ndarray, "words+1"]]:
    """Return the tokens of all words one after another, and where each word's begin."""
    longest = (edges[1:] - edges[:-1]).max()
    ids, ranked = np.empty(longest, np.int32), np.empty(longest, np.int64)
    tokens, first = np.empty(len(packed), np.int32), np.zeros(len(edges), np.int64)
    for k in range(len(edges) - 1):
        count = bpe.encode(merges, packed[edges[k] : edges[k + 1]], ids, ranked)
        tokens[first[k] : first[k] + count] = ids[:count]
        first[k + 1] = first[k] + count
    return tokens[: first[-1]].copy(), first
