"""Pool several rows of a token into one: their weighted arithmetic or geometric mean.

The order of sums does not depend on the order of the sources, so the result is the same to the bit.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm.fusion import tails
from fuselm.fusion.sorted_sums import add_sorted, sort_values, sum_sorted
from fuselm.stores.distributions import Distributions
from fuselm.system import index_checks
from fuselm.system.compiling import compiled

SORTED_BY_INSERTION = 64  # more numbers take longer so than otherwise


class _StackedRows(NamedTuple):
    """Hold all sources' entries in sequence; source s has the entries `edges[s, i]` to `edges[s, i + 1]` at token i."""

    ids: Int[ndarray, "entries"]
    logprobs: Float[ndarray, "entries"]
    edges: Int[ndarray, "sources tokens+1"]


def pool_arithmetic(rows: Sequence[Distributions], weights: Float[ndarray, "tokens sources"]) -> Distributions:
    """Mix the rows: sum w p over sources. A row where all weights are 0 has no information."""
    tail = sum_sorted(weights * np.stack([d.tail for d in rows], axis=1))
    gold = np.where(weights > 0, np.stack([d.gold for d in rows], axis=1).astype(np.float64), -np.inf)
    best = np.maximum(gold.max(axis=1), np.finfo(np.float64).min)
    with np.errstate(divide="ignore"):
        gold = best + np.log(sum_sorted(weights * np.exp(gold - best[:, None])))
    return _build_distributions(weights, gold, tail, *_mix(*_stack_rows(rows), weights))


def pool_geometric(
    rows: Sequence[Distributions], weights: Float[ndarray, "tokens sources"], vocabulary_size: int
) -> Distributions:
    """Pool the rows log-linearly: renormalize the product of p^w. A row where all weights are 0 has no information.

    If a source has not kept an id that others have kept, the id gets the probability that is typical of that source's
    tail (tails.py), but no more than an equal share of it. All sources are assumed to rank the ids that none of them
    kept in the same order. These ids then get the product of the rest of the tails, each to the power of its weight;
    in another order they would get less (Hoelder).
    """
    fitted = [tails.fit_tails(d, vocabulary_size) for d in rows]
    mass, typical = np.stack([t.mass for t in fitted], axis=1), np.stack([t.logprobs for t in fitted], axis=1)
    counts, ids, logprobs, tail, log_total = _pool(*_stack_rows(rows), weights, mass, typical, vocabulary_size)
    gold = np.stack([d.gold for d in rows], axis=1).astype(np.float64)
    pooled = sum_sorted(weights * np.where(weights > 0, gold, 0.0)) - log_total
    return _build_distributions(weights, pooled, tail, counts, ids, logprobs)


def _stack_rows(rows: Sequence[Distributions]) -> _StackedRows:
    for d in rows:
        index_checks.require_offsets("rows", d.offsets, len(d.ids))
        index_checks.require_lengths("rows", len(d.ids), d.logprobs)
        index_checks.require_lengths("rows", len(rows[0]), d.gold, d.tail, d.offsets[1:])
    begins = np.cumsum([0, *(len(d.ids) for d in rows)])
    return _StackedRows(
        ids=np.concatenate([d.ids for d in rows]),
        logprobs=np.concatenate([d.logprobs for d in rows]).astype(np.float64),
        edges=np.stack([d.offsets + begin for d, begin in zip(rows, begins[:-1], strict=True)]),
    )


def _build_distributions(
    weights: Float[ndarray, "tokens sources"],
    gold: Float[ndarray, "tokens"],
    tail: Float[ndarray, "tokens"],
    counts: Int[ndarray, "tokens"],
    ids: Int[ndarray, "slots"],
    logprobs: Float[ndarray, "slots"],
) -> Distributions:
    """Build distributions from a kernel's output, which has `counts[i]` entries for row i."""
    informed = weights.any(axis=1)
    return Distributions(
        offsets=np.append(0, np.cumsum(counts)).astype(np.int64),
        ids=ids[: counts.sum()].astype(np.int32),
        logprobs=np.minimum(logprobs[: counts.sum()], 0.0).astype(np.float32),
        gold=np.where(informed, np.minimum(gold, 0.0), 0.0).astype(np.float32),
        tail=np.where(informed, np.clip(tail, 0.0, 1.0), 1.0).astype(np.float32),
    )


@no_type_check
@compiled(nogil=True)
def _mix(ids, logprobs, edges, weights):
    tokens, sources = weights.shape
    out_ids, out_logprobs = np.empty(len(ids), np.int64), np.empty(len(ids), np.float64)
    counts, written = np.zeros(tokens, np.int64), 0
    most = _count_most(edges)
    bits = 1
    while 1 << bits < 2 * most:
        bits += 1
    table = np.full(1 << bits, -1, np.int64)  # a hash table of the token's distinct ids: their places in `keys`
    slots, keys, values = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.float64)
    given, parts = np.empty(most, np.int64), np.empty((most, sources), np.float64)  # what sources give an id
    for i in range(tokens):
        found = 0
        for s in range(sources):
            if weights[i, s] > 0:
                log_weight = np.log(weights[i, s])
                for entry in range(edges[s, i], edges[s, i + 1]):
                    slot = _find_slot(table, bits, keys, ids[entry])
                    place = table[slot]
                    if place < 0:
                        place = found
                        table[slot], slots[place], keys[place], given[place] = place, slot, ids[entry], 0
                        found += 1
                    parts[place, given[place]] = logprobs[entry] + log_weight
                    given[place] += 1
        for place in range(found):
            table[slots[place]] = -1
            values[place] = _add_logs(parts[place], given[place])
        _sort_by_probability(keys, values, found)
        counts[i] = found
        out_ids[written : written + found], out_logprobs[written : written + found] = keys[:found], values[:found]
        written += found
    return counts, out_ids, out_logprobs


@no_type_check
@compiled(nogil=True)
def _find_slot(table, bits, keys, key):
    """Return the slot of a hash table that holds the place of `key` in `keys`, or the free one where it belongs."""
    mask = (1 << bits) - 1
    slot = (np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)
    slot = np.int64(slot)
    while table[slot] >= 0 and keys[table[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@no_type_check
@compiled(nogil=True)
def _add_logs(logs, count):
    """Return the log of the sum of exponentials of the first `count` values, which are sorted in place for that."""
    sort_values(logs, count)
    largest = logs[count - 1]
    if count == 1:
        return largest
    total = 0.0
    for n in range(count - 1):
        total += np.exp(logs[n] - largest)
    return largest + np.log(total + 1.0)


@no_type_check
@compiled(nogil=True)
def _sort_by_probability(keys, values, count):
    """Sort in place: the most probable entries first, and among equal ones the lowest id first (Shell 1959)."""
    gap = 1
    while gap < count // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for n in range(gap, count):
            key, value, at = keys[n], values[n], n
            while at >= gap:
                before = values[at - gap]
                if before > value or (before == value and keys[at - gap] < key):
                    break
                keys[at], values[at] = keys[at - gap], before
                at -= gap
            keys[at], values[at] = key, value
        gap //= 3


@no_type_check
@compiled(nogil=True)
def _pool(ids, logprobs, edges, weights, tail, typical, vocabulary_size):
    tokens, sources = weights.shape
    out_ids, out_logprobs = np.empty(len(ids), np.int64), np.empty(len(ids), np.float64)
    counts, written = np.zeros(tokens, np.int64), 0
    tails, log_totals = np.zeros(tokens), np.zeros(tokens)
    unkept, left, without = np.zeros(sources), np.zeros(sources), np.empty(sources, np.int64)
    most = max(_count_most(edges), sources)
    order, who, given = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.float64)
    keys, values, part = np.empty(most, np.int64), np.empty(most, np.float64), np.empty(most, np.float64)
    for i in range(tokens):
        count = 0
        for s in range(sources):
            if weights[i, s] > 0:
                for entry in range(edges[s, i], edges[s, i + 1]):
                    order[count] = np.int64(ids[entry]) << 32 | count  # so that only one number moves
                    given[count], who[count] = logprobs[entry], s
                    count += 1
        if count == 0:
            continue
        _sort_numbers(order, count)
        union, last = 0, -1
        for n in range(count):
            union += order[n] >> 32 != last
            last = order[n] >> 32
        rest = 1 if vocabulary_size > union else 0
        for s in range(sources):
            unkept[s], left[s], without[s] = 0.0, 0.0, 0
            if weights[i, s] > 0:
                without[s] = union - (edges[s, i + 1] - edges[s, i])  # ids that only others have kept
                if without[s] > 0:
                    unkept[s] = min(typical[i, s], np.log(tail[i, s] / (without[s] + rest)))
                if rest == 1:
                    left[s] = weights[i, s] * np.log(tail[i, s] - without[s] * np.exp(unkept[s]))
            part[s] = weights[i, s] * unkept[s]
        base = add_sorted(part, sources)
        kept, begin = 0, 0
        while begin < count:
            key, end = order[begin] >> 32, begin
            while end < count and order[end] >> 32 == key:
                n = order[end] & 0xFFFFFFFF
                s = who[n]
                part[end - begin] = weights[i, s] * (given[n] - (unkept[s] if without[s] > 0 else 0.0))
                end += 1
            keys[kept], values[kept] = key, base + add_sorted(part, end - begin)
            kept, begin = kept + 1, end
        beyond = add_sorted(left, sources) if rest == 1 else -np.inf
        best = beyond
        for n in range(kept):
            best = max(best, values[n])
        total = 0.0
        for n in range(kept):
            total += np.exp(values[n] - best)
        log_total = best + np.log(total + np.exp(beyond - best))
        for n in range(kept):
            values[n] -= log_total
        counts[i], tails[i], log_totals[i] = kept, np.exp(beyond - log_total), log_total
        _sort_by_probability(keys, values, kept)
        out_ids[written : written + kept], out_logprobs[written : written + kept] = keys[:kept], values[:kept]
        written += kept
    return counts, out_ids, out_logprobs, tails, log_totals


@no_type_check
@compiled(nogil=True)
def _count_most(edges):
    """Return the number of entries of the token that has the most in all sources, and at least 1."""
    most = 1
    for i in range(edges.shape[1] - 1):
        total = 0
        for s in range(len(edges)):
            total += edges[s, i + 1] - edges[s, i]
        most = max(most, total)
    return most


@no_type_check
@compiled(nogil=True)
def _sort_numbers(numbers, count):
    """Sort the first `count` numbers in place."""
    if count > SORTED_BY_INSERTION:
        numbers[:count].sort()
    else:
        sort_values(numbers, count)
