"""Tokenize short byte strings by a BPE tokenizer's merges, compiled, in under a microsecond each.

The pair of neighbours that was learned first is merged first (Sennrich et al. 2016, arXiv 1508.07909). This serves
strings that a pre-tokenizer would not cut, such as the rest of a token and the bytes that may follow it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.system.compiling import compiled

NOTHING = -1  # marks what no token spells
NEVER = np.iinfo(np.int64).max  # ranks a pair that is not merged


class Merges(NamedTuple):
    """Hold a tokenizer as open-addressed tables.

    Merging begins with the characters of a string, or with the bytes of those that have no token; a byte-level
    tokenizer has no tokens for characters.
    """

    characters: Int[ndarray, "character_slots"]  # UTF-8 bytes, as one number
    character_ids: Int[ndarray, "character_slots"]
    byte_ids: Int[ndarray, "256"]
    pairs: Int[ndarray, "pair_slots 2"]  # left id << 32 | right id; then rank << 32 | merged id, in one cache line


def compile_merges(
    merges: Sequence[tuple[int, int, int]], characters: Mapping[bytes, int], byte_ids: Mapping[int, int]
) -> Merges:
    """Build tables from (left id, right id, merged id) by rank, and from the ids of characters (in UTF-8) and bytes."""
    by_byte = np.full(256, NOTHING, np.int32)
    by_byte[list(byte_ids)] = list(byte_ids.values())
    numbers = np.array([int.from_bytes(c) for c in characters], np.int64)
    table, character_ids = make_table(len(numbers)), np.array(list(characters.values()), np.int32)
    by_slot = np.full(len(table), NOTHING, np.int32)
    by_slot[_fill(table, numbers)] = character_ids
    left, right, merged = np.array(merges, np.int64).reshape(-1, 3).T
    pairs = np.full((len(make_table(len(left))), 2), NOTHING, np.int64)
    _fill_pairs(pairs, left << 32 | right, np.arange(len(left)) << 32 | merged)
    return Merges(characters=table, character_ids=by_slot, byte_ids=by_byte, pairs=pairs)


def make_table(keys: int) -> Int[ndarray, "slots"]:
    """Return an empty open-addressed table that stays less than half full with that many keys."""
    return np.full(1 << max(2 * keys, 4).bit_length(), NOTHING, np.int64)


@compiled()
@no_type_check  # numba cannot keep what it compiles of a function that a checker wraps
def _fill(table: ndarray, keys: ndarray) -> ndarray:
    at = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        at[i] = find_slot(table, keys[i])
        table[at[i]] = keys[i]
    return at


@compiled()
@no_type_check
def _fill_pairs(pairs: ndarray, keys: ndarray, values: ndarray) -> None:
    for i in range(len(keys)):
        slot = _pair_slot(pairs, keys[i])
        if pairs[slot, 0] == NOTHING:  # the first of equal pairs counts
            pairs[slot, 0], pairs[slot, 1] = keys[i], values[i]


@compiled()
@no_type_check
def find_slot(table: ndarray, key: int) -> int:
    """Return the slot of `key`, or the free slot where it would be."""
    slot = _mixed(key) & (len(table) - 1)
    while table[slot] != NOTHING and table[slot] != key:
        slot = (slot + 1) & (len(table) - 1)
    return slot


@compiled()
@no_type_check
def _pair_slot(pairs: ndarray, key: int) -> int:
    slot = _mixed(key) & (len(pairs) - 1)
    while pairs[slot, 0] != NOTHING and pairs[slot, 0] != key:
        slot = (slot + 1) & (len(pairs) - 1)
    return slot


@compiled()
@no_type_check
def _mixed(key: int) -> int:
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(mixed >> np.uint64(32))


@compiled()
@no_type_check
def encode(merges: Merges, string: ndarray, ids: ndarray, ranked: ndarray) -> int:
    """Put the tokens of `string` (bytes) into `ids`, and return their number. Both arrays have at least its length."""
    count = split_characters(merges, string, ids)
    for i in range(count - 1):
        ranked[i] = find_merge(merges, ids[i], ids[i + 1])
    while count > 1 and join_best(merges, ids, ranked, count) != NEVER:
        count -= 1
    return count


@compiled()
@no_type_check
def join_best(merges: Merges, ids: ndarray, ranked: ndarray, count: int) -> int:
    """Join the pair of the first `count` tokens that is merged first, and return its merge; `NEVER` if none is."""
    best = 0
    for i in range(1, count - 1):
        if ranked[i] < ranked[best]:
            best = i
    merge = ranked[best]
    if merge == NEVER:
        return merge
    ids[best] = merge & 0xFFFFFFFF
    for i in range(best + 1, count - 1):
        ids[i] = ids[i + 1]
        ranked[i - 1] = ranked[i]
    for i in range(max(best - 1, 0), min(best + 1, count - 2)):
        ranked[i] = find_merge(merges, ids[i], ids[i + 1])
    return merge


@compiled()
@no_type_check
def split_characters(merges: Merges, string: ndarray, ids: ndarray) -> int:
    """Put the tokens that merging begins with into `ids`, and return their number."""
    count = i = 0
    while i < len(string):
        first = string[i]
        length = 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        number = np.int64(first)
        for k in range(i + 1, i + length):
            if k == len(string) or string[k] & 0xC0 != 0x80:
                number, length = np.int64(first), 1  # no character: a byte
                break
            number = number << 8 | string[k]
        slot = find_slot(merges.characters, number)
        if merges.characters[slot] == number:
            ids[count] = merges.character_ids[slot]
            count += 1
        else:
            for k in range(i, i + length):
                ids[count] = merges.byte_ids[string[k]]
                count += 1
        i += length
    return count


@compiled()
@no_type_check
def find_merge(merges: Merges, left: int, right: int) -> int:
    """Return rank << 32 | merged id of two neighbours."""
    if left < 0 or right < 0:
        return NEVER
    key = np.int64(left) << 32 | np.int64(right)
    slot = _pair_slot(merges.pairs, key)
    return merges.pairs[slot, 1] if merges.pairs[slot, 0] == key else NEVER
