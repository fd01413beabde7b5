"""Spell the entries of rows that begin inside a target token, together with the token's bytes before them.

Compiled code follows the merges of a BPE tokenizer; a tokenizer of another kind is called itself. span.py uses the
result.
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
    """Hold where a source's rows begin in a stream of bytes, which is the text after one space.

    A tokenizer may put that space before the text. `within` is the number of bytes that lie before a row in the target
    token that it begins in. `hidden` is the number of the first row's bytes that the target does not have: 1 if only
    the source puts a space before the text.
    """

    stream: UInt8[ndarray, "bytes"]
    begins: Int[ndarray, "rows"]
    within: Int[ndarray, "rows"]
    hidden: int


class Continuations(NamedTuple):
    """Hold the target's tokens for the entries of rows that begin inside a target token, and for the bytes before them.

    Entry m of a row is spelled `tokens[offsets[base + m]:offsets[base + m + 1]]`. `base` is -1 for all other rows.
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


def spell_continuations(
    source: Vocabulary, target: Vocabulary, rows: Distributions, starts: RowStarts
) -> Continuations:
    """Spell in the target's tokens the entries of those `rows` whose `starts` are inside a target token."""
    index_checks.require_within("an id", rows.ids, source.size)
    index_checks.require_offsets("rows", rows.offsets, len(rows.ids))
    index_checks.require_lengths("starts", len(rows.offsets) - 1, starts.begins, starts.within)
    index_checks.require_within("where a row begins", starts.begins, len(starts.stream) + 1)
    index_checks.require_within(
        "where a row begins in its token", starts.begins - starts.within, len(starts.stream) + 1
    )
    index_checks.require_within("the bytes of a token before a row", starts.within, len(starts.stream) + 1)
    index_checks.require_within("the hidden bytes", np.array([starts.hidden]), len(starts.stream) + 1)
    if target.merges is None:
        return _spell_by_tokenizer(source, target, rows, starts)
    return Continuations(*_spell_by_merges(target.merges, *starts, rows.offsets, rows.ids, *source.packed_bytes))


def _spell_by_tokenizer(
    source: Vocabulary, target: Vocabulary, rows: Distributions, starts: RowStarts
) -> Continuations:
    """Spell entries with the target's tokenizer, which is slower than `_spell_by_merges`."""
    base = np.full(len(starts.begins), -1, np.int64)
    strings: list[bytes] = []
    inside = (starts.within > 0) | ((np.arange(len(starts.begins)) == 0) & (starts.hidden > 0))
    for row in np.flatnonzero(inside).tolist():
        base[row] = len(strings)
        before = starts.stream[starts.begins[row] - starts.within[row] : starts.begins[row]].tobytes()
        unseen = starts.stream[: starts.hidden if row == 0 else 0].tobytes()
        for token in rows.row(row)[0]:
            string = source.token_bytes[token] or b""
            strings.append(before + string[len(unseen) :] if string and string.startswith(unseen) else b"")
    return Continuations(base, *join_sequences(target.encode_bytes(strings)))


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
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
    """Return an array of a greater length that begins with the same items."""
    result = np.empty(length, array.dtype)
    result[: len(array)] = array
    return result
