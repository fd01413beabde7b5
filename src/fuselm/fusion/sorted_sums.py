"""Add numbers of several sources from the least to the greatest, so that the order of the sources changes no bit."""

from typing import no_type_check

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from fuselm.system.compiling import compiled


def sum_sorted(values: Float[ndarray, "tokens sources"]) -> Float[ndarray, "tokens"]:
    """Return the sum of each row."""
    return _sum_rows(np.array(values, np.float64, order="C"))


@no_type_check
@compiled(nogil=True)
def _sum_rows(values):
    sums = np.empty(len(values))
    for row in range(len(values)):
        sums[row] = add_sorted(values[row], values.shape[1])
    return sums


@no_type_check
@compiled(nogil=True)
def add_sorted(values, count):
    """Return the sum of the first `count` values, which are sorted in place for that."""
    sort_values(values, count)
    total = 0.0
    for n in range(count):
        total += values[n]
    return total


@no_type_check
@compiled(nogil=True)
def sort_values(values, count):
    """Sort the first `count` values in place, which are few."""
    for n in range(1, count):
        value, at = values[n], n
        while at > 0 and values[at - 1] > value:
            values[at] = values[at - 1]
            at -= 1
        values[at] = value
