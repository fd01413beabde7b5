"""Round the values of a store to few different ones, so that Parquet's encodings compress them well.

Rounding is coarse where it matters least. The square root of a probability is rounded evenly, because the error of a KL
divergence and of a gradient depends on it; small probabilities are rounded by ratio. Rows are read back with entries
and tail that sum to 1, the most probable entries first. docs/store.md states the bounds.
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm.system import index_checks
from fuselm.system.compiling import compiled

ROOTS = 160  # steps of an entry's square root; with 160 a byte tells all values apart, and zstd likes whole bytes
SMALLEST_ROOT = 8  # below its square, 1/400, quarters of a nat
QUARTERS = 4
GOLD_STEPS = 128  # a nat
TAIL_ROOTS = 256
WEIGHT_STEPS = 256

GRIDS = {  # for the fields' metadata
    "logprobs": f"exp(x/2) is a multiple of 1/{ROOTS}; below {SMALLEST_ROOT}/{ROOTS}, steps of 1/{QUARTERS} nat",
    "gold": f"multiples of 1/{GOLD_STEPS} nat",
    "tail": f"squares of multiples of 1/{TAIL_ROOTS}",
    "weights": f"multiples of 1/{WEIGHT_STEPS}",
}
_LOG_SMALLEST = 2 * np.log(SMALLEST_ROOT / ROOTS)
_LOGS_OF_ROOTS = 2 * np.log(np.maximum(np.arange(ROOTS + 1), SMALLEST_ROOT) / ROOTS)
_SORTED_BY_INSERTION = 64  # longer rows take longer so than by merging


def round_logprobs(logprobs: Float[ndarray, "entries"]) -> Float[ndarray, "entries"]:
    """Round natural-log probabilities to the grid of entries.

    The square root of a probability moves by at most 1/320; a probability below 1/400 moves by at most 1/8 nat.
    """
    exact = logprobs.astype(np.float64)
    return _round_to_grid(exact, np.exp(exact / 2), _LOGS_OF_ROOTS)  # numpy's exp takes many at a time


def round_gold(gold: Float[ndarray, "tokens"]) -> Float[ndarray, "tokens"]:
    """Round golds by at most 1/256 nat."""
    return (np.round(gold.astype(np.float64) * GOLD_STEPS) / GOLD_STEPS).astype(np.float32)


def round_tail(tail: Float[ndarray, "tokens"]) -> Float[ndarray, "tokens"]:
    """Round the square root of each tail by at most 1/512; a tail above 0 is never rounded to 0."""
    roots = np.round(np.sqrt(tail.astype(np.float64)) * TAIL_ROOTS)
    return ((np.where(tail > 0, np.maximum(roots, 1), 0) / TAIL_ROOTS) ** 2).astype(np.float32)


def round_weights(weights: Float[ndarray, "_"]) -> Float[ndarray, "_"]:
    """Round weights by at most 1/512."""
    return (np.round(weights.astype(np.float64) * WEIGHT_STEPS) / WEIGHT_STEPS).astype(np.float32)


def sort_rows_by_id(
    offsets: Int[ndarray, "edges"], ids: Int[ndarray, "entries"], logprobs: Float[ndarray, "entries"]
) -> tuple[Int[ndarray, "entries"], Float[ndarray, "entries"]]:
    """Sort each row by its ids, because ascending ids compress better."""
    _require_rows(offsets, ids, logprobs)
    ids, logprobs = ids.astype(np.int32), logprobs.astype(np.float32)
    return _sorted_rows(offsets, ids.astype(np.int64), ids, logprobs)


def restore_rows(
    offsets: Int[ndarray, "edges"],
    ids: Int[ndarray, "entries"],
    logprobs: Float[ndarray, "entries"],
    tail: Float[ndarray, "tokens"],
) -> tuple[Int[ndarray, "entries"], Float[ndarray, "entries"], Float[ndarray, "tokens"]]:
    """Turn rows as they are on disk into rows that sum to 1 with their tails, the most probable entries first.

    Entries that were drawn from a tail (-inf on disk) share its probability evenly.
    """
    _require_rows(offsets, ids, logprobs)
    logprobs, tail = normalise_rows(offsets, logprobs, tail)
    keys = np.abs(logprobs).view(np.int32).astype(np.int64)  # the bits of positive floats are in their order
    return *_sorted_rows(offsets, keys, ids, logprobs), tail


def normalise_rows(
    offsets: Int[ndarray, "edges"], logprobs: Float[ndarray, "entries"], tail: Float[ndarray, "tokens"]
) -> tuple[Float[ndarray, "entries"], Float[ndarray, "tokens"]]:
    """Make rows sum to 1 with their tails, as `restore_rows` does, but keep the entries in the order on disk."""
    index_checks.require_offsets("rows", offsets, len(logprobs))
    index_checks.require_lengths("rows", len(offsets) - 1, tail)
    logprobs, tail = logprobs.copy(), tail.copy()
    _normalise(offsets, np.exp(logprobs), logprobs, tail)  # numpy's exp takes many at a time, numba's does not
    return logprobs, tail


def _require_rows(offsets: Int[ndarray, "edges"], ids: Int[ndarray, "_"], logprobs: Float[ndarray, "_"]) -> None:
    index_checks.require_offsets("rows", offsets, len(ids))
    index_checks.require_lengths("rows", len(ids), logprobs)


@compiled(nogil=True)
@no_type_check
def _round_to_grid(exact: ndarray, roots: ndarray, logs_of_roots: ndarray) -> ndarray:
    """Round log-probabilities, given the square roots of the probabilities, and the logs of what roots round to."""
    rounded = np.empty(len(exact), np.float32)
    for n in range(len(exact)):
        if exact[n] >= _LOG_SMALLEST:
            root = np.rint(roots[n] * ROOTS)
            rounded[n] = logs_of_roots[np.int64(root)] if root <= ROOTS else 2 * np.log(root / ROOTS)
        else:
            rounded[n] = _LOG_SMALLEST + np.rint((exact[n] - _LOG_SMALLEST) * QUARTERS) / QUARTERS
    return rounded


@compiled(nogil=True)
@no_type_check  # of a function that a checker wraps, numba can't keep what it compiled
def _normalise(offsets: ndarray, masses: ndarray, logprobs: ndarray, tail: ndarray) -> None:
    for row in range(len(offsets) - 1):
        total, drawn = np.float64(tail[row]), 0
        for e in range(offsets[row], offsets[row + 1]):
            total += masses[e]
            drawn += logprobs[e] == -np.inf
        if not total > 0.0:  # no distribution: nothing to divide by
            continue
        shift = np.float32(np.log(total))
        if drawn:
            share, tail[row] = np.float32(np.log(tail[row] / drawn)), 0.0
            for e in range(offsets[row], offsets[row + 1]):
                if logprobs[e] == -np.inf:
                    logprobs[e] = share
        for e in range(offsets[row], offsets[row + 1]):
            logprobs[e] = min(logprobs[e] - shift, np.float32(0.0))
        tail[row] = tail[row] / total


@compiled(nogil=True)
@no_type_check
def _sorted_rows(offsets: ndarray, keys: ndarray, ids: ndarray, logprobs: ndarray) -> tuple[ndarray, ndarray]:
    """Sort each row by ascending keys below 2 ** 31, stably."""
    new_ids, new_logprobs = np.empty_like(ids), np.empty_like(logprobs)
    for row in range(len(offsets) - 1):
        begin, end = offsets[row], offsets[row + 1]
        for e in range(begin, end):
            keys[e] = keys[e] << 32 | (e - begin)  # so that only one number moves
        if end - begin > _SORTED_BY_INSERTION:
            keys[begin:end].sort()
        else:
            for e in range(begin + 1, end):
                key, at = keys[e], e
                while at > begin and keys[at - 1] > key:
                    keys[at] = keys[at - 1]
                    at -= 1
                keys[at] = key
        for e in range(begin, end):
            come_from = begin + (keys[e] & 0xFFFFFFFF)
            new_ids[e], new_logprobs[e] = ids[come_from], logprobs[come_from]
    return new_ids, new_logprobs
