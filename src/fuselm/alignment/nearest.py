"""Find the tokens of a vocabulary at the least edit distance from given strings, faster than brute force.

The Levenshtein distance of two strings is at least the difference of their lengths, and at least the number of
characters that one has and the other lacks. So the search begins with tokens of a string's own length and moves to
longer and shorter ones, and within each length compares only tokens that could be as near as the nearest one so far.
The set of a string's characters is 128 bits, which are compared for many tokens at a time. Distances are computed for
64 characters at a time (Myers 1999, J. ACM 46:3).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Int, Int32, UInt32, UInt64
from numpy import ndarray

from fuselm.system import machine
from fuselm.system.compiling import compiled

STRINGS_PER_TASK = 2048  # strings that a thread takes at a time
BLOCK = 256  # tokens whose bounds are computed at a time
FAR = 1 << 30  # above any distance
OWN, SHARED, REPEATED = 64, 32, 32  # bits for the most frequent characters, for the others, and for repeated ones


def find_nearest_tokens(strings: list[str], vocabulary: list[str | None]) -> Int[ndarray, "strings"]:
    """Find for each string the lowest id of the vocabulary's tokens at the least edit distance.

    A None in the vocabulary stands for no token.
    """
    return np.array([ids[0] for ids in _search(strings, vocabulary, every=False)], np.int64)


def find_tied_tokens(strings: list[str], vocabulary: list[str | None]) -> list[Int[ndarray, "ties"]]:
    """Find for each string the increasing ids of all tokens at the least edit distance."""
    return [np.sort(ids) for ids in _search(strings, vocabulary, every=True)]


def _search(strings: list[str], vocabulary: list[str | None], *, every: bool) -> list[Int[ndarray, "ids"]]:
    """Search on as many threads as there are free cores."""
    ids = np.array([i for i, token in enumerate(vocabulary) if token is not None], np.int64)
    assert len(ids), "a vocabulary without a token"
    tokens = [token for token in vocabulary if token is not None]
    lengths = np.array([len(token) for token in tokens])
    by_length = np.argsort(lengths, kind="stable")
    first_of_length = np.searchsorted(lengths[by_length], np.arange(lengths.max() + 2))
    ids, tokens = ids[by_length], [tokens[i] for i in by_length]
    code_points, counts = np.unique(_encode_code_points(tokens), return_counts=True)
    alphabet = code_points[np.argsort(-counts, kind="stable")]  # frequent characters get bits of their own
    known = _encode(tokens, alphabet)[:3]

    order = sorted(range(len(strings)), key=strings.__getitem__)  # similar strings have similar tokens near

    def search(begin: int) -> list[Int[ndarray, "ids"]]:
        wanted = _encode([strings[i] for i in order[begin : begin + STRINGS_PER_TASK]], alphabet)
        found, ends = _search_chunk(*wanted, *known, ids, first_of_length, len(alphabet), every)
        return np.split(found, ends[:-1])

    with ThreadPoolExecutor(min(machine.count_worker_threads(), numba.config.NUMBA_NUM_THREADS)) as threads:
        found = [ids for chunk in threads.map(search, range(0, len(strings), STRINGS_PER_TASK)) for ids in chunk]
    return [found[i] for i in np.argsort(order)]


def _encode_code_points(strings: list[str]) -> UInt32[ndarray, "characters"]:
    return np.frombuffer("".join(strings).encode("utf-32-le"), np.uint32)


def _encode(
    strings: list[str], alphabet: UInt32[ndarray, "alphabet"]
) -> tuple[Int32[ndarray, "characters"], Int[ndarray, "starts"], UInt64[ndarray, "2 strings"], Int[ndarray, "strings"]]:
    """Encode characters as indices into the alphabet; its length stands for any other character.

    Also return where each string begins, its signature (bits for its characters, and several characters may share one),
    and how many of its characters are not in the alphabet.
    """
    starts = np.zeros(len(strings) + 1, np.int64)
    np.cumsum([len(s) for s in strings], out=starts[1:])
    code_points = _encode_code_points(strings)
    by_code_point = np.argsort(alphabet)
    at = np.searchsorted(alphabet, code_points, sorter=by_code_point)
    candidates = np.append(by_code_point, len(alphabet))[at]
    in_alphabet = np.append(alphabet, 0)[candidates] == code_points
    characters = np.where(in_alphabet, candidates, len(alphabet)).astype(np.int32)
    return characters, starts, *_compute_signatures(characters, starts, len(alphabet))


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _compute_signatures(characters: ndarray, starts: ndarray, alphabet: int) -> tuple[ndarray, ndarray]:
    signatures = np.zeros((2, len(starts) - 1), np.uint64)
    foreign = np.zeros(len(starts) - 1, np.int64)
    for s in range(len(starts) - 1):
        for at in range(starts[s], starts[s + 1]):
            character = characters[at]
            if character == alphabet:
                foreign[s] += 1
                continue
            bit = character if character < OWN else OWN + character % SHARED
            for before in range(starts[s], at):
                if characters[before] == character:
                    bit = OWN + SHARED + character % REPEATED
            signatures[bit // 64, s] |= np.uint64(1) << np.uint64(bit % 64)
    return signatures, foreign


@compiled(nogil=True)
@no_type_check
def _search_chunk(
    wanted: ndarray,
    wanted_starts: ndarray,
    wanted_signatures: ndarray,
    foreign: ndarray,
    characters: ndarray,
    starts: ndarray,
    signatures: ndarray,
    ids: ndarray,
    first_of_length: ndarray,
    alphabet: int,
    every: bool,
) -> tuple[ndarray, ndarray]:
    """Find the ids of the nearest tokens of all strings, and where each string's ids end.

    With `every`, all nearest tokens are found, otherwise the lowest id.
    """
    strings, longest = len(wanted_starts) - 1, len(first_of_length) - 2
    words = 1
    for s in range(strings):
        words = max(words, (wanted_starts[s + 1] - wanted_starts[s] + 63) // 64)
    masks = np.zeros((alphabet + 1, words), np.uint64)  # by character: the positions where the string has it
    column = np.empty((2, words), np.uint64)
    bounds = np.empty(BLOCK, np.int32)
    first, second = signatures[0], signatures[1]
    ends = np.zeros(strings, np.int64)
    found, total = np.empty(strings, np.int64), 0
    near = 0  # a token that may be near the next string as well
    for s in range(strings):
        begin, length = wanted_starts[s], wanted_starts[s + 1] - wanted_starts[s]
        for at in range(length):
            masks[wanted[begin + at], at // 64] |= np.uint64(1) << np.uint64(at % 64)
        if every and total + len(ids) > len(found):
            found = np.concatenate((found, np.empty(len(found) + len(ids), np.int64)))
        nearest = _compute_distance(masks, length, characters, starts[near], starts[near + 1], column, FAR)
        count = 0
        for turn in range(2 * max(length, longest) + 1):
            difference = (turn + 1) // 2
            if difference > nearest:
                break
            other = length + (difference if turn % 2 else -difference)
            if other < 0 or other > longest:
                continue
            more, less = foreign[s] + max(other - length, 0), max(length - other, 0)
            for low in range(first_of_length[other], first_of_length[other + 1], BLOCK):
                high = min(low + BLOCK, first_of_length[other + 1])
                limit = nearest if every or count == 0 or ids[low] < found[total] else nearest - 1
                a, b = wanted_signatures[0, s], wanted_signatures[1, s]
                if _bound_distances(a, b, more, less, first[low:high], second[low:high], bounds) > limit:
                    continue
                for t in range(low, high):
                    if bounds[t - low] > limit:
                        continue
                    limit = nearest if every or count == 0 or ids[t] < found[total] else nearest - 1
                    if bounds[t - low] > limit:
                        continue
                    distance = _compute_distance(masks, length, characters, starts[t], starts[t + 1], column, limit)
                    if distance > limit:
                        continue
                    if distance < nearest or not every:
                        count = 0
                    found[total + count] = ids[t]
                    nearest, near, count = distance, t, count + 1
        total += count
        ends[s] = total
        for at in range(length):
            masks[wanted[begin + at], at // 64] = 0
    return found[:total], ends


@compiled(nogil=True)
@no_type_check
def _bound_distances(a: int, b: int, more: int, less: int, first: ndarray, second: ndarray, bounds: ndarray) -> int:
    """Bound the distance from below, of a string with signature (a, b) to each of some tokens of one length.

    `more` is the number of the string's characters that no token has, plus the characters by which tokens are longer;
    `less` is the number by which they are shorter. If the string is longer by n, it has n more characters that the
    token lacks than the token has characters that the string lacks.
    """
    least = FAR
    for t in range(len(first)):
        lacking = _count_bits(a & ~first[t]) + _count_bits(b & ~second[t])
        extra = _count_bits(first[t] & ~a) + _count_bits(second[t] & ~b)
        bounds[t] = max(lacking + more, extra + less)
        least = min(least, bounds[t])
    return least


@compiled(nogil=True, inline="always")
@no_type_check
def _count_bits(x: int) -> int:
    """Count bits in the way that LLVM recognizes as one instruction."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled(nogil=True)
@no_type_check
def _compute_distance(
    masks: ndarray, length: int, characters: ndarray, begin: int, end: int, column: ndarray, limit: int
) -> int:
    """Compute the Levenshtein distance of a token and the string that `masks` stands for.

    If the distance is above `limit`, the result is any number above it. The table of distances is computed column by
    column, as differences down the column: +1 at the bits of column[0], -1 at those of column[1]. Names are Myers'
    (figures 7 and 10), and a word is one of his blocks.
    """
    one = np.uint64(1)
    words = (length + 63) // 64
    column[0, :words], column[1, :words] = ~np.uint64(0), 0
    distance = length
    for at in range(begin, end):
        change = 1  # from this column to the next, in the row above the word
        for word in range(words):
            pv, mv, eq = column[0, word], column[1, word], masks[characters[at], word]
            xv = eq | mv
            eq |= np.uint64(change < 0)
            xh = (((eq & pv) + pv) ^ pv) | eq
            ph, mh = mv | ~(xh | pv), pv & xh
            last = one << np.uint64((length - 1) % 64 if word == words - 1 else 63)
            above, change = change, np.int64(ph & last != 0) - np.int64(mh & last != 0)
            ph, mh = ph << one | np.uint64(above > 0), mh << one | np.uint64(above < 0)
            column[0, word], column[1, word] = mh | ~(xv | ph), ph & xv
        distance += change
        if distance - (end - 1 - at) > limit:
            return limit + 1
    return distance
