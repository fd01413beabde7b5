"""Pair positions as the paper does (MinED): dynamic time warping under the edit distance of token strings.

See Wan et al. 2024, section 3.2. Ties are broken as the released code breaks them: diagonal, then source, then target.
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fuselm.models.vocabulary import Vocabulary
from fuselm.system.compiling import compiled

MOST_STEPS = 1 << 26  # pairs of positions whose steps are held at a time, a byte each
UNREACHED = 1 << 62
DIAGONAL, SOURCE, TARGET = range(3)  # steps: both positions advance, or one of them; the first of equal cost wins


def pair_positions(
    source_tokens: list[str], target_tokens: list[str], *, most_steps: int = MOST_STEPS
) -> Int[ndarray, "path 2"]:
    """Return the pairs (source position, target position) of the cheapest monotone path, first to last.

    The cost of a pair is the Levenshtein distance of the two token strings, which have no word-boundary marks.
    If there are more pairs than `most_steps`, each step is found twice, so that not all have to be held.
    """
    if not source_tokens or not target_tokens:
        return np.zeros((0, 2), np.int64)
    source_strings, target_strings = list(dict.fromkeys(source_tokens)), list(dict.fromkeys(target_tokens))
    longest = max(map(len, [*source_strings, *target_strings]))
    dtype = np.uint8 if longest < 256 else np.uint32  # a distance is at most the longer length
    costs = cdist(source_strings, target_strings, scorer=Levenshtein.distance, dtype=dtype)
    rows = max(most_steps // len(target_tokens), 1)
    return _find_cheapest_path(
        costs, _find_indices(source_tokens, source_strings), _find_indices(target_tokens, target_strings), rows
    )


def strip_word_marks(vocabulary: Vocabulary, ids: Int[ndarray, "tokens"]) -> list[str]:
    """Return token strings without word-boundary marks."""
    strings = [vocabulary.token_strings[i] or "" for i in ids]
    return [string.replace(vocabulary.word_mark, "") for string in strings] if vocabulary.word_mark else strings


def _find_indices(tokens: list[str], strings: list[str]) -> Int[ndarray, "tokens"]:
    """Return for each token its index in `strings`."""
    indices = {string: i for i, string in enumerate(strings)}
    return np.array([indices[token] for token in tokens])


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _find_cheapest_path(costs: ndarray, sources: ndarray, targets: ndarray, rows: int) -> ndarray:
    """Find the cheapest path by blocks of `rows` source positions.

    It computes the totals before each block going forward, and the steps going backward.
    """
    m, n = len(sources), len(targets)
    blocks = (m + rows - 1) // rows
    before = np.empty((blocks, n + 1), np.int64)  # totals of the last row of the block before, after a border
    totals = np.full(n + 1, UNREACHED)
    totals[0] = 0
    steps = np.empty((min(rows, m), n), np.uint8)
    for i in range((blocks - 1) * rows):
        if i % rows == 0:
            before[i // rows] = totals
        _advance_totals(totals, costs[sources[i]], targets, steps[0])
    before[blocks - 1] = totals
    path = np.empty((m + n - 1, 2), np.int64)
    i, j, at = m - 1, n - 1, m + n - 1
    for block in range(blocks - 1, -1, -1):
        first = block * rows
        totals = before[block]
        for row in range(first, i + 1):
            _advance_totals(totals, costs[sources[row]], targets[: j + 1], steps[row - first])
        while i >= first and j >= 0:
            at -= 1
            path[at, 0], path[at, 1] = i, j
            step = steps[i - first, j]
            i -= step != TARGET
            j -= step != SOURCE
    return path[at:]


@compiled(nogil=True)
@no_type_check
def _advance_totals(totals: ndarray, costs: ndarray, targets: ndarray, steps: ndarray) -> None:
    """Turn the totals of one source position into the next one's, in place; `totals` has a border before it."""
    diagonal = totals[0]
    totals[0] = left = UNREACHED
    for j in range(len(targets)):
        up = totals[j + 1]
        best, step = diagonal, DIAGONAL
        if up < best:
            best, step = up, SOURCE
        if left < best:
            best, step = left, TARGET
        left = best + costs[targets[j]]
        totals[j + 1] = left
        steps[j] = step
        diagonal = up
