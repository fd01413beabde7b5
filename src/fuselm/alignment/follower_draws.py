"""Draw what may follow tokens from what followers.py learned, compiled."""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from fuselm.alignment.continuation import lengthen
from fuselm.models.chat.messages import END_OF_TURN
from fuselm.system.compiling import compiled

MOST_FOLLOWERS = 32  # of one token
MOST_POOLED = 64  # tokens that go on with a word, or that do not, of one kind
PRIOR = 2.0  # what tokens of the same class are followed by counts as much as this many rows
LEAST_BYTES, MOST_BYTES = 6, 40  # bytes that are kept of what follows; white space is followed to its end
END = END_OF_TURN[0]
IS_SPACE: Bool[ndarray, "256"] = np.array([bytes([b]).isspace() for b in range(256)])


class Learned(NamedTuple):
    """Hold what comes after tokens, in arrays. `ids` are all that came, by their bytes; others say places in it.

    After token x came `own_ids[own_first[x]:own_first[x + 1]]`. Tokens of kind k are followed by `pool_ids` from
    `pool_first[k]` on, which go on with a word, or by `other_ids`. Texts that followed token x begin at
    `text_first[x]`, and those that followed `pairs[p]`, which is the token before << 32 | token, at `pair_first[p]`.
    """

    ids: Int[ndarray, "known"]
    own_first: Int[ndarray, "vocabulary+1"]
    own_ids: Int[ndarray, "own"]
    own_shares: Float[ndarray, "own"]
    pool_first: Int[ndarray, "kinds+1"]
    pool_ids: Int[ndarray, "pooled"]
    pool_shares: Float[ndarray, "pooled"]
    other_first: Int[ndarray, "kinds+1"]
    other_ids: Int[ndarray, "others"]
    other_shares: Float[ndarray, "others"]
    text_first: Int[ndarray, "vocabulary+1"]
    text_ids: Int[ndarray, "texts"]
    pairs: Int[ndarray, "pairs"]
    pair_first: Int[ndarray, "pairs+1"]
    pair_texts: Int[ndarray, "paired"]


class Drawn(NamedTuple):
    """Hold what follows tokens: `first[n]` to `first[n + 1]` have ids or -1, texts behind those, and weights."""

    first: Int[ndarray, "tokens+1"]
    ids: Int[ndarray, "drawn"]
    texts: Int[ndarray, "drawn"]
    weights: Float[ndarray, "drawn"]


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def draw_evenly(weights: ndarray, most: int) -> ndarray:
    """Return shares that sum to `most`: of all or, if there are more than `most`, of a systematic sample in order."""
    total = weights.sum()
    if total <= 0:
        return np.zeros(len(weights))
    draws = weights / total * most
    if len(weights) > most:
        draws[:] = 0.0
        reached, place = weights[0] / total, 0
        for n in range(most):
            while reached < (n + 0.5) / most and place < len(weights) - 1:
                place += 1
                reached += weights[place] / total
            draws[place] += 1.0
    return draws


@compiled(nogil=True)
@no_type_check
def draw_followers(learned: Learned, separate: ndarray, tokens: ndarray, kinds: ndarray, rates: ndarray) -> Drawn:
    """Draw for each token what follows it. `separate` says which ids of its pool may come behind it.

    `kinds` has each token's pool, or -1, and `rates` how often a word goes on there.
    """
    first, filled = np.zeros(len(tokens) + 1, np.int64), 0
    ids, texts = np.empty(64 * len(tokens) + 64, np.int64), np.empty(64 * len(tokens) + 64, np.int64)
    weights = np.empty(64 * len(tokens) + 64)
    sums, touched = np.zeros(len(learned.ids)), np.empty(len(learned.ids), np.int64)
    for n in range(len(tokens)):
        count = _sum_followers(learned, separate[n], tokens[n], kinds[n], rates[n], sums, touched)
        chosen = np.sort(touched[:count])
        begun = filled
        if count:
            draws = draw_evenly(sums[chosen], MOST_FOLLOWERS)
            sums[chosen] = 0.0
            for k in range(count):
                if draws[k] <= 0:
                    continue
                y = learned.ids[chosen[k]]
                behind, a, b = _find_texts(learned, tokens[n], y)
                few = min(max(int(np.rint(draws[k])), 1), b - a)
                if filled + max(few, 1) > len(ids):
                    ids, texts = lengthen(ids, 2 * (filled + few)), lengthen(texts, 2 * (filled + few))
                    weights = lengthen(weights, 2 * (filled + few))
                for t in range(max(few, 1)):
                    ids[filled], texts[filled] = y, behind[a + t] if few else 0
                    weights[filled] = draws[k] / max(few, 1)
                    filled += 1
        if filled == begun:
            ids[filled], texts[filled], weights[filled] = -1, 0, 1.0
            filled += 1
        weights[begun:filled] /= weights[begun:filled].sum()
        first[n + 1] = filled
    return Drawn(first, ids[:filled].copy(), texts[:filled].copy(), weights[:filled].copy())


@compiled(nogil=True)
@no_type_check
def _sum_followers(
    learned: Learned, separate: ndarray, token: int, kind: int, rate: float, sums: ndarray, touched: ndarray
) -> int:
    """Add up in `sums` what follows a token, and put into `touched` where; return the number of places."""
    own, own_stop = learned.own_first[token], learned.own_first[token + 1]
    total_own, count, scale = learned.own_shares[own:own_stop].sum(), 0, 1.0
    if kind >= 0:
        begin, stop, total = learned.pool_first[kind], learned.pool_first[kind + 1], 0.0
        for p in range(begin, stop):
            if separate[p - begin]:
                total += learned.pool_shares[p]
        rate = rate if total > 0 else 0.0
        if own_stop > own:
            scale = 1.0 - total_own / (total_own + PRIOR)
        if rate > 0:
            for p in range(begin, stop):
                if separate[p - begin]:
                    sums[learned.pool_ids[p]] = learned.pool_shares[p] * rate / total * scale
                    touched[count] = learned.pool_ids[p]
                    count += 1
        for p in range(learned.other_first[kind], learned.other_first[kind + 1]):
            sums[learned.other_ids[p]] = learned.other_shares[p] * (1 - rate) * scale
            if sums[learned.other_ids[p]] > 0:
                touched[count] = learned.other_ids[p]
                count += 1
    share = 1.0 - scale if count else 1.0
    for e in range(own, own_stop):
        y = learned.own_ids[e]
        if sums[y] == 0.0:
            touched[count] = y
            count += 1
        sums[y] += learned.own_shares[e] * share / total_own
    return count


@compiled(nogil=True)
@no_type_check
def _find_texts(learned: Learned, before: int, token: int) -> tuple[ndarray, int, int]:
    """Return texts that followed a token behind another one or, if there are none, behind any, and which they are."""
    key = before << 32 | token
    low, high = 0, len(learned.pairs)
    while low < high:
        middle = (low + high) // 2
        if learned.pairs[middle] < key:
            low = middle + 1
        else:
            high = middle
    if low < len(learned.pairs) and learned.pairs[low] == key:
        return learned.pair_texts, learned.pair_first[low], learned.pair_first[low + 1]
    return learned.text_ids, learned.text_first[token], learned.text_first[token + 1]


@compiled(nogil=True)
@no_type_check
def cut_followers(tokens: ndarray, offsets: ndarray, packed: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Return the bytes of tokens, and where in them some bytes behind each begin and end, if anything follows."""
    ends = np.empty(len(tokens), np.int64)
    size = 0
    for n in range(len(tokens)):
        size += offsets[tokens[n] + 1] - offsets[tokens[n]]
        ends[n] = size
    data, begins, at = np.empty(size, np.uint8), ends.copy(), 0
    for token in tokens:
        for k in range(offsets[token], offsets[token + 1]):
            data[at] = packed[k]
            at += 1
    for n in range(len(tokens)):
        ends[n] = find_follower_end(data, begins[n])
    return data, begins, ends


@compiled(nogil=True)
@no_type_check
def find_follower_end(data: ndarray, begin: int) -> int:
    """Return where some bytes from `begin` on end, which end no character or white space early, or end a turn.

    It is `begin` if nothing follows, as after the end of a text or of a turn.
    """
    if begin > 0 and data[begin - 1] == END:
        return begin
    end = min(begin + LEAST_BYTES, len(data))
    while end < min(len(data), begin + MOST_BYTES) and IS_SPACE[data[end - 1]]:
        end += 1
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    for k in range(begin, end):
        if data[k] == END:
            return k + 1
    return begin if end > begin and IS_SPACE[data[end - 1]] else end
