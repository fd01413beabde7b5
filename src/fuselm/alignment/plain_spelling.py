"""Tokenize many strings at once by compiled merges, where no pre-tokenizer cuts them."""

import itertools
from typing import no_type_check

import numpy as np
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray

from fuselm.models import bpe
from fuselm.models.vocabulary import Vocabulary
from fuselm.system.compiling import compiled

CHECKED = 256  # strings on which a tokenizer is compared with its merges
LEADING = 0xC3  # the first byte of the letters of Latin-1
SPACE, UPPER_A, UPPER_Z, LOWER_A, LOWER_Z = b" AZaz"


class PlainSpeller:
    """Tokenize as a vocabulary's `encode_bytes` does, and faster where it is BPE and the string is a plain word."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._merges = find_merges_of_words(vocabulary)

    def spell(self, strings: list[bytes]) -> list[tuple[int, ...]]:
        """Return the tokens of each string; `UNMAPPED` ends those of a string that tokens do not spell."""
        if self._merges is None:
            return self._vocabulary.encode_bytes(strings)
        are_plain = _find_plain(*_pack(strings)).tolist()
        words = iter(spell_words(self._merges, [s for s, plain in zip(strings, are_plain, strict=True) if plain]))
        others = iter(
            self._vocabulary.encode_bytes([s for s, plain in zip(strings, are_plain, strict=True) if not plain])
        )
        return [next(words if plain else others) for plain in are_plain]


def find_merges_of_words(vocabulary: Vocabulary) -> bpe.Merges | None:
    """Return the tokenizer's merges if they alone split words as it does."""
    if vocabulary.merges is None:
        return None
    offsets, packed = vocabulary.packed_bytes
    words = [vocabulary.token_bytes[i] or b"" for i in np.flatnonzero(_find_plain(packed, offsets)).tolist()]
    ends = [b for b in words if b[:1] != b" " and b[:1].islower()]
    if not ends:
        return None
    step = max(len(words) // CHECKED, 1)
    strings = [word + ends[n * 7919 % len(ends)] for n, word in enumerate(words[::step])]
    agrees = spell_words(vocabulary.merges, strings) == vocabulary.encode_bytes(strings)
    return vocabulary.merges if agrees else None


def spell_words(merges: bpe.Merges, words: list[bytes]) -> list[tuple[int, ...]]:
    """Return the tokens of each string by merges alone."""
    if not words:
        return []
    tokens, first = _spell_packed(merges, *_pack(words))
    listed, at = tokens.tolist(), first.tolist()
    return [tuple(listed[a:b]) for a, b in itertools.pairwise(at)]


def _pack(strings: list[bytes]) -> tuple[UInt8[ndarray, "bytes"], Int[ndarray, "edges"]]:
    """Return the bytes of all strings, and where each begins and the last one ends."""
    edges = np.append(0, np.cumsum([len(s) for s in strings])).astype(np.int64)
    return np.frombuffer(b"".join(strings), np.uint8), edges


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def is_plain(string: ndarray) -> bool:
    """Tell whether a string is a word of ASCII or Latin-1 in lower case, except for its first letter.

    A space may be before it.
    """
    at = 1 if len(string) and string[0] == SPACE else 0
    is_first = True
    while at < len(string):
        byte = string[at]
        if byte == LEADING and at + 1 < len(string):
            second = string[at + 1]
            is_lower = (0x9F <= second <= 0xB6) or (0xB8 <= second <= 0xBF)
            is_upper = (0x80 <= second <= 0x96) or (0x98 <= second <= 0x9E)
            at += 2
        else:
            is_lower, is_upper = LOWER_A <= byte <= LOWER_Z, UPPER_A <= byte <= UPPER_Z
            at += 1
        if not (is_lower or (is_first and is_upper)):
            return False
        is_first = False
    return not is_first


@compiled(nogil=True)
@no_type_check
def _find_plain(packed: UInt8[ndarray, "bytes"], edges: Int[ndarray, "strings+1"]) -> Bool[ndarray, "strings"]:
    result = np.empty(len(edges) - 1, np.bool_)
    for k in range(len(result)):
        result[k] = is_plain(packed[edges[k] : edges[k + 1]])
    return result


@compiled(nogil=True)
@no_type_check
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
