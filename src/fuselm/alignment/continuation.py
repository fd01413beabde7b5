"""Spell the entries of rows that begin inside a target token, together with the token's bytes before them.

A BPE tokenizer's merges are followed in compiled code; a tokenizer of another kind is asked itself. For span.py.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from fuselm.alignment.spelling import join_sequences
from fuselm.models import bpe
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.system import index_checks
from fuselm.system.compiling import compiled


class RowStarts(NamedTuple):
    """Hold where a source's rows begin in a stream of bytes: a text behind one space, which a tokenizer may put there.

    `within` says how many bytes of the target token that a row begins in lie before it. `hidden` says how many bytes of
    the first row the target does not have: 1 if only the source puts a space before the text.
    """

    stream: UInt8[ndarray, "bytes"]
    begins: Int[ndarray, "rows"]
    within: Int[ndarray, "rows"]
    hidden: int


class Continuations(NamedTuple):
    """Hold the target's tokens for the entries of rows that begin inside a target token, and for the bytes before them.

    Entry m of a row is spelled `tokens[offsets[base + m]:offsets[base + m + 1]]`, `base` being -1 for all other rows.
    """

    base: Int[ndarray, "rows"]
    offsets: Int[ndarray, "_"]
    tokens: Int[ndarray, "_"]


def find_row_starts(
    stream: UInt8[ndarray, "bytes"], begins: Int[ndarray, "rows"], target_begins: Int[ndarray, "edges"]
) -> RowStarts:
    """Find where rows begin in the target's tokens; `target_begins` ends with the end of the stream."""
    if not len(begins) or len(target_begins) == 1:
        return RowStarts(stream, begins, np.zeros(len(begins), np.int64), 0)
    within = begins - target_begins[:-1][np.searchsorted(target_begins[:-1], begins, side="right").clip(1) - 1]
    within[0] = max(begins[0] - target_begins[0], 0)
    return RowStarts(stream, begins, within, int(max(target_begins[0] - begins[0], 0)))


def spell_continuations(source: Vocabulary, target: Vocabulary, rows: Distributions, at: RowStarts) -> Continuations:
    """Spell in the target's tokens the entries of `rows` that begin, `at` these places, inside a target token."""
    index_checks.require_within("an id", rows.ids, source.size)
    index_checks.require_offsets("rows", rows.offsets, len(rows.ids))
    index_checks.require_lengths("places", len(rows.offsets) - 1, at.begins, at.within)
    index_checks.require_within("where a row begins", at.begins, len(at.stream) + 1)
    index_checks.require_within("where a row begins in its token", at.begins - at.within, len(at.stream) + 1)
    index_checks.require_within("the bytes of a token before a row", at.within, len(at.stream) + 1)
    index_checks.require_within("the hidden bytes", np.array([at.hidden]), len(at.stream) + 1)
    if target.merges is None:
        return _spell_by_tokenizer(source, target, rows, at)
    return Continuations(*_spell_by_merges(target.merges, *at, rows.offsets, rows.ids, *source.packed_bytes))


def _spell_by_tokenizer(source: Vocabulary, target: Vocabulary, rows: Distributions, at: RowStarts) -> Continuations:
    base = np.full(len(at.begins), -1, np.int64)
    strings: list[bytes] = []
    inside = (at.within > 0) | ((np.arange(len(at.begins)) == 0) & (at.hidden > 0))
    for row in np.flatnonzero(inside).tolist():
        base[row] = len(strings)
        before = at.stream[at.begins[row] - at.within[row] : at.begins[row]].tobytes()
        unseen = at.stream[: at.hidden if row == 0 else 0].tobytes()
        for token in rows.row(row)[0]:
            string = source.token_bytes[token] or b""
            strings.append(before + string[len(unseen) :] if string and string.startswith(unseen) else b"")
    return Continuations(base, *join_sequences(target.encode_bytes(strings)))


@compiled(nogil=True)
@no_type_check  # of a function that a checker wraps, numba can't keep what it compiled
def _spell_by_merges(
    merges: bpe.Merges,
    stream: ndarray,
    begins: ndarray,
    within: ndarray,
    hidden: int,
    offsets: ndarray,
    ids: ndarray,
    source_offsets: ndarray,
    source_bytes: ndarray,
) -> tuple[ndarray, ndarray, ndarray]:
    base, entries, longest = np.full(len(begins), -1, np.int64), 0, 0
    for row in range(len(begins)):
        if within[row] > 0 or (row == 0 and hidden > 0):
            base[row] = entries
            entries += offsets[row + 1] - offsets[row]
            for x in ids[offsets[row] : offsets[row + 1]]:
                longest = max(longest, within[row] + source_offsets[x + 1] - source_offsets[x])
    string, ranked, spelled = np.empty(longest, np.uint8), np.empty(longest, np.int64), np.empty(longest, np.int32)
    result_offsets, tokens, filled = np.zeros(entries + 1, np.int64), np.empty(4 * entries + longest, np.int32), 0
    for row in range(len(begins)):
        if base[row] < 0:
            continue
        before, unseen = within[row], hidden if row == 0 else 0
        for k in range(before):
            string[k] = stream[begins[row] - before + k]
        for e in range(offsets[row], offsets[row + 1]):
            own, length = source_offsets[ids[e]], source_offsets[ids[e] + 1] - source_offsets[ids[e]]
            agrees = length >= max(unseen, 1)
            for k in range(unseen):
                agrees = agrees and source_bytes[own + k] == stream[k]
            if agrees:
                for k in range(unseen, length):
                    string[before + k - unseen] = source_bytes[own + k]
                count = bpe.encode(merges, string[: before + length - unseen], spelled, ranked)
                if filled + count > len(tokens):
                    tokens = lengthen(tokens, 2 * len(tokens) + count)
                for k in range(count):
                    tokens[filled + k] = spelled[k]
                filled += count
            result_offsets[base[row] + e - offsets[row] + 1] = filled
    return base, result_offsets, tokens[:filled].copy()


@compiled(nogil=True)
@no_type_check
def lengthen(array: ndarray, length: int) -> ndarray:
    """Return a longer array that begins with the same items."""
    result = np.empty(length, array.dtype)
    result[: len(array)] = array
    return result
