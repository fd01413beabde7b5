"""Tell whether a BPE tokenizer leaves two tokens apart, one behind the other, without tokenizing them together."""

from typing import no_type_check

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from fuselm.models import bpe
from fuselm.system.compiling import compiled


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def find_separate(
    merges: bpe.Merges, offsets: ndarray, packed: ndarray, lefts: ndarray, rights: ndarray
) -> Bool[ndarray, "lefts rights"]:
    """Tell for each pair of a left and a right token whether the tokenizer splits their bytes into just these two.

    Merges within each token are the same with or without the other until a merge joins the two. So both sequences of
    merges are run through side by side, the first by rank, until a pair that spans the two comes first.
    """
    longest = 1
    for t in lefts:
        longest = max(longest, offsets[t + 1] - offsets[t])
    for t in rights:
        longest = max(longest, offsets[t + 1] - offsets[t])
    ids, ranked = np.empty(2 * longest, np.int32), np.empty(2 * longest, np.int64)
    right_ranks = np.empty((len(rights), longest + 1), np.int64)
    right_ids = np.empty((len(rights), longest + 1), np.int32)
    right_steps = np.empty(len(rights), np.int64)
    for r in range(len(rights)):
        string = packed[offsets[rights[r]] : offsets[rights[r] + 1]]
        right_steps[r] = -1
        if len(string):
            right_steps[r] = _trace_merges(merges, string, rights[r], False, ids, ranked, right_ranks[r], right_ids[r])
    ranks, ends = np.empty(longest + 1, np.int64), np.empty(longest + 1, np.int32)
    result = np.zeros((len(lefts), len(rights)), np.bool_)
    both = np.empty(2 * longest, np.uint8)
    for n in range(len(lefts)):
        own = packed[offsets[lefts[n]] : offsets[lefts[n] + 1]]
        steps = _trace_merges(merges, own, lefts[n], True, ids, ranked, ranks, ends) if len(own) else -1
        for r in range(len(rights)):
            other = packed[offsets[rights[r]] : offsets[rights[r] + 1]]
            if steps < 0 or right_steps[r] < 0:
                continue
            if other[0] & 0xC0 == 0x80:  # it may end a character that the other begins
                both[: len(own)], both[len(own) : len(own) + len(other)] = own, other
                count = bpe.encode(merges, both[: len(own) + len(other)], ids, ranked)
                result[n, r] = count == 2 and ids[0] == lefts[n] and ids[1] == rights[r]
            else:
                result[n, r] = _are_separate(merges, ranks, ends, steps, right_ranks[r], right_ids[r], right_steps[r])
    return result


@compiled(nogil=True)
@no_type_check
def _are_separate(
    merges: bpe.Merges, ranks: ndarray, ends: ndarray, steps: int, other_ranks: ndarray, begins: ndarray, others: int
) -> bool:
    i = j = 0
    crossing = bpe.find_merge(merges, ends[0], begins[0])
    while i < steps or j < others:
        left = ranks[i] if i < steps else bpe.NEVER
        right = other_ranks[j] if j < others else bpe.NEVER
        if crossing < left and crossing <= right and crossing != bpe.NEVER:
            return False
        if left <= right:
            i += 1
            changed = ends[i] != ends[i - 1]
        else:
            j += 1
            changed = begins[j] != begins[j - 1]
        if changed:
            crossing = bpe.find_merge(merges, ends[i], begins[j])
    return crossing == bpe.NEVER


@compiled(nogil=True)
@no_type_check
def _trace_merges(
    merges: bpe.Merges,
    string: ndarray,
    token: int,
    is_left: bool,
    ids: ndarray,
    ranked: ndarray,
    ranks: ndarray,
    edges: ndarray,
) -> int:
    """Put the rank of each merge that makes a token into `ranks`, and its piece at the edge before and after each.

    The edge is the last piece of a left token, the first one of a right token. Return the number of merges, or -1 if
    the tokenizer splits the string otherwise.
    """
    count = bpe.split_characters(merges, string, ids)
    steps = 0
    edges[0] = ids[count - 1] if is_left else ids[0]
    for i in range(count - 1):
        ranked[i] = bpe.find_merge(merges, ids[i], ids[i + 1])
    while count > 1:
        ranks[steps] = bpe.join_best(merges, ids, ranked, count)
        if ranks[steps] == bpe.NEVER:
            return -1
        count -= 1
        steps += 1
        edges[steps] = ids[count - 1] if is_left else ids[0]
    return steps if count == 1 and ids[0] == token else -1
