"""Remember where things are by number: an open-addressed table that grows, and arrays that do.

Long arrays are pages of their own, which take memory as they are filled, and none when they are replaced.
"""

import mmap
from typing import no_type_check

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.models import bpe
from fuselm.system.compiling import compiled

OWN_PAGES = 1 << 18  # bytes from which an array has pages of its own


class KeyTable:
    """Number keys, which are 0 or more, in the order in which they are added."""

    def __init__(self) -> None:
        self.count = 0
        self._keys = bpe.make_table(1 << 11)
        self._places = np.zeros(len(self._keys), np.int64)

    def find(self, keys: Int[ndarray, "keys"]) -> Int[ndarray, "keys"]:
        """Return the number of each key, or -1."""
        return _find_places(self._keys, self._places, keys)

    @property
    def arrays(self) -> tuple[Int[ndarray, "slots"], Int[ndarray, "slots"]]:
        """Return the table of keys, in which compiled code finds a slot, and the number of the key in each slot."""
        return self._keys, self._places

    def add(self, keys: Int[ndarray, "keys"]) -> None:
        """Give the next numbers to keys that have none; each comes once."""
        if 2 * (self.count + len(keys)) > len(self._keys):
            there = self._keys != bpe.NOTHING
            known, places = self._keys[there], self._places[there]
            self._keys = bpe.make_table(2 * (self.count + len(keys)))
            self._places = _make_zeros(len(self._keys), np.int64)
            _insert(self._keys, self._places, known, places)
        _insert(self._keys, self._places, keys, np.arange(self.count, self.count + len(keys)))
        self.count += len(keys)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._places.nbytes


class GrowingArray:
    """Append to an array; what was given out before stays as it was."""

    def __init__(self, dtype: type, items: tuple = ()):
        self._items = np.zeros(1024, dtype)
        self.count = 0
        self.append(np.array(items, dtype))

    def append(self, items: ndarray) -> None:
        if self.count + len(items) > len(self._items):
            longer = _make_zeros(2 * (self.count + len(items)), self._items.dtype)
            longer[: self.count] = self._items[: self.count]
            self._items = longer
        self._items[self.count : self.count + len(items)] = items
        self.count += len(items)

    @property
    def items(self) -> ndarray:
        return self._items[: self.count]

    @property
    def nbytes(self) -> int:
        return self.count * self._items.itemsize


def _make_zeros(size: int, dtype: type | np.dtype) -> ndarray:
    """Return zeros, as `numpy.zeros` does; many of them are pages that no other process sees."""
    if (count := size * np.dtype(dtype).itemsize) < OWN_PAGES:
        return np.zeros(size, dtype)
    return np.frombuffer(mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype)


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _find_places(table: ndarray, places: ndarray, keys: ndarray) -> Int[ndarray, "keys"]:
    result = np.empty(len(keys), np.int64)
    for k in range(len(keys)):
        slot = bpe.find_slot(table, keys[k])
        result[k] = places[slot] if table[slot] == keys[k] else -1
    return result


@compiled(nogil=True)
@no_type_check
def _insert(table: ndarray, places: ndarray, keys: ndarray, at: ndarray) -> None:
    for k in range(len(keys)):
        slot = bpe.find_slot(table, keys[k])
        table[slot], places[slot] = keys[k], at[k]
