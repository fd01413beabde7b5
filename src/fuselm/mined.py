"""The paper's pairs of positions (MinED): dynamic time warping under the edit distance of token strings.

Wan et al. 2024, section 3.2. Ties are broken as the released code breaks them: diagonal, then source, then target.
"""

from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Int
from numpy import ndarray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist


def pair_positions(source_tokens: list[str], target_tokens: list[str]) -> Int[ndarray, "path 2"]:
    """The pairs (source position, target position) of the cheapest monotone path, first to last.

    The cost of a pair is the Levenshtein distance of the two token strings, which come without word-boundary marks.
    """
    if not source_tokens or not target_tokens:
        return np.zeros((0, 2), np.int64)
    return _cheapest_path(cdist(source_tokens, target_tokens, scorer=Levenshtein.distance, dtype=np.uint16))


@numba.njit(cache=True)
@no_type_check  # of a function that a checker wraps, numba can't keep what it compiled
def _cheapest_path(cost: ndarray) -> ndarray:
    m, n = cost.shape
    total = np.empty((m, n), np.int64)
    for i in range(m):
        for j in range(n):
            if i == 0 and j == 0:
                best = 0
            elif i == 0:
                best = total[0, j - 1]
            elif j == 0:
                best = total[i - 1, 0]
            else:
                best = min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
            total[i, j] = best + cost[i, j]
    path = np.empty((m + n - 1, 2), np.int64)
    i, j, at = m - 1, n - 1, m + n - 2
    path[at, 0], path[at, 1] = i, j
    while i > 0 or j > 0:
        if i == 0:
            j -= 1
        elif j == 0:
            i -= 1
        else:
            best = min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
            if total[i - 1, j - 1] == best:
                i -= 1
                j -= 1
            elif total[i - 1, j] == best:
                i -= 1
            else:
                j -= 1
        at -= 1
        path[at, 0], path[at, 1] = i, j
    return path[at:]
