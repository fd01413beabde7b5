"""Check the numbers that compiled code indexes with, before it is called.

A kernel that numba compiles reads whatever memory an index points to. So the function that calls one asks here first:
`ValueError` names the array and what is wrong with it. Each check is a pass over an array that the kernel reads anyway.
"""

from typing import no_type_check

import numpy as np
from numpy import ndarray

from fuselm.system.compiling import compiled


def require_within(what: str, numbers: ndarray, stop: int, *, start: int = 0) -> None:
    """Raise `ValueError` unless all numbers are at least `start` and below `stop`."""
    if len(numbers) and not (start <= (least := int(numbers.min())) and int(numbers.max()) < stop):
        outside = least if least < start else int(numbers.max())
        raise ValueError(f"{what} {outside} is out of range, needs {start} to {stop - 1}")


def require_offsets(what: str, offsets: ndarray, length: int) -> None:
    """Raise `ValueError` unless `offsets` cut `length` entries into rows: from 0, never falling, to `length`."""
    if not _do_offsets_cut(offsets, length):
        raise ValueError(f"{what}: offsets do not cut {length} entries into rows")


def require_lengths(what: str, length: int, *arrays: ndarray) -> None:
    """Raise `ValueError` unless all arrays have `length` items."""
    for array in arrays:
        if len(array) != length:
            raise ValueError(f"{what}: an array of {len(array)} items, needs {length}")


@compiled(nogil=True)
@no_type_check  # of a function that a checker wraps, numba can't keep what it compiled
def _do_offsets_cut(offsets, length):
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != length:
        return False
    fits = True
    for i in range(len(offsets) - 1):
        fits &= offsets[i] <= offsets[i + 1]
    return fits


def require_ascending(what: str, numbers: ndarray) -> None:
    """Raise `ValueError` where a number is below the one before it."""
    if len(numbers) > 1 and bool((np.diff(numbers) < 0).any()):
        raise ValueError(f"{what} are not in order")
