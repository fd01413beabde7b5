"""Put the splits of a string together that have the same first token, so that one look decides about all of them."""

from typing import no_type_check

import numpy as np
from numpy import ndarray

from fuselm.system.compiling import compiled


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def group_splits(
    first: ndarray,
    weights: ndarray,
    token_first: ndarray,
    tokens: ndarray,
    next_first: ndarray,
    next_stop: ndarray,
) -> tuple[ndarray, ndarray, ndarray, ndarray, ndarray, ndarray, ndarray, ndarray]:
    """Return the same arrays, where splits are sorted by first token and equal ones are one.

    Two more say of the first split of a group how many splits and which weight it has; other splits have 0.
    """
    new_first, count, filled = np.zeros(len(first), np.int64), 0, 0
    new_weights, new_tokens = np.empty(len(weights)), np.empty(len(tokens), np.int32)
    new_token_first = np.zeros(len(weights) + 1, np.int64)
    new_next_first, new_next_stop = np.zeros(len(weights), np.int64), np.zeros(len(weights), np.int64)
    sizes, sums = np.zeros(len(weights), np.int64), np.zeros(len(weights))
    for n in range(len(first) - 1):
        own = first[n + 1] - first[n]
        leads = np.empty(own, np.int64)
        for k in range(own):
            s = first[n] + k
            leads[k] = tokens[token_first[s]] if token_first[s + 1] > token_first[s] else -1
        begun, group = count, count
        for k in np.argsort(leads, kind="mergesort"):
            s = first[n] + k
            length = token_first[s + 1] - token_first[s]
            if count == begun or leads[k] != _lead(new_tokens, new_token_first, group):
                group = count
            same = -1
            for other in range(group, count):
                if new_token_first[other + 1] - new_token_first[other] != length:
                    continue
                if next_stop[s] != next_first[s] or new_next_stop[other] != new_next_first[other]:
                    continue
                equal = True
                for m in range(length):
                    equal = equal and new_tokens[new_token_first[other] + m] == tokens[token_first[s] + m]
                if equal:
                    same = other
                    break
            sums[group] += weights[s]
            if same >= 0:
                new_weights[same] += weights[s]
                continue
            for m in range(length):
                new_tokens[filled] = tokens[token_first[s] + m]
                filled += 1
            new_weights[count], new_next_first[count], new_next_stop[count] = weights[s], next_first[s], next_stop[s]
            count += 1
            new_token_first[count] = filled
            sizes[group] += 1
        new_first[n + 1] = count
    return (
        new_first,
        new_weights[:count].copy(),
        new_token_first[: count + 1].copy(),
        new_tokens[:filled].copy(),
        new_next_first[:count].copy(),
        new_next_stop[:count].copy(),
        sizes[:count].copy(),
        sums[:count].copy(),
    )


@compiled(nogil=True)
@no_type_check
def _lead(tokens: ndarray, token_first: ndarray, split: int) -> int:
    return tokens[token_first[split]] if token_first[split + 1] > token_first[split] else -1
