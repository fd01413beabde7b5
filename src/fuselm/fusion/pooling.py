"""Pool several rows of a token into one: their weighted arithmetic or geometric mean.

The order of sums does not depend on the order of the sources, so the result is the same to the bit.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm.fusion import tails
from fuselm.stores.distributions import Distributions
from fuselm.system import index_checks
from fuselm.system.compiling import compiled


class _StackedRows(NamedTuple):
    """Hold all sources' entries in sequence; source s has the entries `edges[s, i]` to `edges[s, i + 1]` at token i."""

    ids: Int[ndarray, "entries"]
    logprobs: Float[ndarray, "entries"]
    edges: Int[ndarray, "sources tokens+1"]


def pool_arithmetic(rows: Sequence[Distributions], weights: Float[ndarray, "tokens sources"]) -> Distributions:
    """Mix the rows: sum w p over sources. A row where all weights are 0 has no information."""
    tail = _sum_sorted(weights * np.stack([d.tail for d in rows], axis=1))
    gold = np.where(weights > 0, np.stack([d.gold for d in rows], axis=1).astype(np.float64), -np.inf)
    best = np.maximum(gold.max(axis=1), np.finfo(np.float64).min)
    with np.errstate(divide="ignore"):
        gold = best + np.log(_sum_sorted(weights * np.exp(gold - best[:, None])))
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
    pooled = _sum_sorted(weights * np.where(weights > 0, gold, 0.0)) - log_total
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


def _sum_sorted(values: Float[ndarray, "tokens sources"]) -> Float[ndarray, "tokens"]:
    return np.sort(values, axis=1).sum(axis=1)


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
    out_ids, out_logprobs = np.empty(len(ids), np.int64), np.empty(len(ids), np.float64)
    counts, written = np.zeros(len(weights), np.int64), 0
    for i in range(len(weights)):
        keys, values, who = _gather(i, ids, logprobs, edges, weights)
        kept, begin = 0, 0
        while begin < len(keys):
            end = _find_run_end(keys, begin)
            for n in range(begin, end):
                values[n] += np.log(weights[i, who[n]])
            total = values[begin]
            if end - begin > 1:
                part = np.sort(values[begin:end])
                total = part[-1] + np.log(np.exp(part - part[-1]).sum())
            keys[kept], values[kept] = keys[begin], total
            kept, begin = kept + 1, end
        counts[i] = kept
        written = _write(keys[:kept], values[:kept], out_ids, out_logprobs, written)
    return counts, out_ids, out_logprobs


@no_type_check
@compiled(nogil=True)
def _pool(ids, logprobs, edges, weights, tail, typical, vocabulary_size):
    tokens, sources = weights.shape
    out_ids, out_logprobs = np.empty(len(ids), np.int64), np.empty(len(ids), np.float64)
    counts, written = np.zeros(tokens, np.int64), 0
    tails, log_totals = np.zeros(tokens), np.zeros(tokens)
    unkept, left, without = np.zeros(sources), np.zeros(sources), np.empty(sources, np.int64)
    for i in range(tokens):
        keys, values, who = _gather(i, ids, logprobs, edges, weights)
        if len(keys) == 0:
            continue
        union, begin = 0, 0
        while begin < len(keys):
            begin = _find_run_end(keys, begin)
            union += 1
        rest = 1 if vocabulary_size > union else 0
        for s in range(sources):
            unkept[s], left[s] = 0.0, 0.0
            if weights[i, s] > 0:
                without[s] = union - (edges[s, i + 1] - edges[s, i])  # ids that only others have kept
                if without[s] > 0:
                    unkept[s] = min(typical[i, s], np.log(tail[i, s] / (without[s] + rest)))
                if rest == 1:
                    left[s] = weights[i, s] * np.log(tail[i, s] - without[s] * np.exp(unkept[s]))
        base = 0.0
        for value in np.sort(weights[i] * unkept):
            base += value
        kept, begin = 0, 0
        while begin < len(keys):
            end = _find_run_end(keys, begin)
            for n in range(begin, end):
                values[n] = weights[i, who[n]] * (values[n] - (unkept[who[n]] if without[who[n]] > 0 else 0.0))
            keys[kept], values[kept] = keys[begin], base + np.sort(values[begin:end]).sum()
            kept, begin = kept + 1, end
        beyond = np.sort(left).sum() if rest == 1 else -np.inf
        best = max(values[:kept].max(), beyond)
        log_total = best + np.log(np.exp(values[:kept] - best).sum() + np.exp(beyond - best))
        values[:kept] -= log_total
        counts[i], tails[i], log_totals[i] = kept, np.exp(beyond - log_total), log_total
        written = _write(keys[:kept], values[:kept], out_ids, out_logprobs, written)
    return counts, out_ids, out_logprobs, tails, log_totals


@no_type_check
@compiled(nogil=True)
def _gather(i, ids, logprobs, edges, weights):
    """Collect ids, log-probabilities and sources of the entries that count at token i, sorted by id."""
    sources = weights.shape[1]
    total = 0
    for s in range(sources):
        if weights[i, s] > 0:
            total += edges[s, i + 1] - edges[s, i]
    keys, values, who = np.empty(total, np.int64), np.empty(total, np.float64), np.empty(total, np.int64)
    n = 0
    for s in range(sources):
        if weights[i, s] > 0:
            for entry in range(edges[s, i], edges[s, i + 1]):
                keys[n], values[n], who[n] = ids[entry], logprobs[entry], s
                n += 1
    order = np.argsort(keys, kind="mergesort")
    return keys[order], values[order], who[order]


@no_type_check
@compiled(nogil=True)
def _find_run_end(keys, begin):
    """Return the index after the keys that equal the one at `begin`."""
    end = begin + 1
    while end < len(keys) and keys[end] == keys[begin]:
        end += 1
    return end


@no_type_check
@compiled(nogil=True)
def _write(keys, values, out_ids, out_logprobs, written):
    """Write the most probable entries first, and among equal ones the lowest id first."""
    for n in np.argsort(-values, kind="mergesort"):
        out_ids[written], out_logprobs[written] = keys[n], values[n]
        written += 1
    return written
