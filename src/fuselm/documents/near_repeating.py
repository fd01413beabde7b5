"""Find training texts that are nearly the same as one of dev or held-out, by MinHash.

Two texts are alike by the share of their runs of five words that are in both (Broder 1997). As in FineWeb (Penedo et
al. 2024, arXiv 2406.17557), 112 hashes in 14 bands of 8 find 92 % of the texts that are alike by 0.8, 77 % by 0.75,
56 % by 0.7, and 5 % by 0.5. Only the bands of dev and held-out texts are kept, 112 bytes for each.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Int, UInt64
from numpy import ndarray

from fuselm.documents.splitting import TRAIN, spell_text
from fuselm.documents.texts import TextRow
from fuselm.system.progress import Progress

WORDS = 5  # of a run
BANDS, ROWS = 14, 8
BLOCK = 4096  # texts that are looked up together
_WORD = re.compile(rb"\w+|[^\s\w]", re.ASCII)  # letters beyond ASCII are cut alike wherever they are


def find(
    read: Callable[[], Iterable[tuple[int, TextRow]]], splits: Int[ndarray, "rows"], *, progress: Progress
) -> Int[ndarray, "found"]:
    """Return which of the rows are training texts that nearly repeat one of dev or held-out.

    `read` yields the rows, which `splits` has a split for, and is called twice. Raises `ValueError` if the library is
    not installed.
    """
    held = _hash_rows(row for (_, row), split in zip(read(), splits, strict=True) if split != TRAIN)
    tables = _collect_bands(held)
    progress.note(f"looking for near repeats of {int((splits != TRAIN).sum()):,} texts that are held out")
    found: list[int] = []
    numbers = np.flatnonzero(splits == TRAIN)
    rows = (row for (_, row), split in zip(read(), splits, strict=True) if split == TRAIN)
    begin = 0
    for bands in _hash_rows(rows):
        is_found = np.zeros(len(bands), bool)
        for column, table in zip(bands.T, tables, strict=True):
            place = np.searchsorted(table, column)
            is_found |= (place < len(table)) & (table[np.minimum(place, len(table) - 1)] == column)
        found += numbers[begin : begin + len(bands)][is_found].tolist()
        begin += len(bands)
    return np.array(found, np.int64)


def _collect_bands(blocks: Iterable[UInt64[ndarray, "texts bands"]]) -> list[UInt64[ndarray, "texts"]]:
    whole = np.concatenate([np.zeros((0, BANDS), np.uint64), *blocks])
    return [np.unique(column) for column in whole.T]


def _hash_rows(rows: Iterable[TextRow]) -> Iterator[UInt64[ndarray, "texts bands"]]:
    """Yield the hash of each band of each text, many texts at a time."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise ValueError(
            "corpus.near_repeats: the datasketch library is not installed; pip install 'fuselm[repeats]'"
        ) from None
    empty = MinHash(num_perm=BANDS * ROWS, seed=1, hashfunc=hash_run)
    block = []
    for row in rows:
        sketch = empty.copy()
        sketch.update_batch(list_runs(spell_text(row.text)))
        block.append(sketch.hashvalues)
        if len(block) == BLOCK:
            yield _hash_bands(np.array(block, np.uint64))
            block = []
    if block:
        yield _hash_bands(np.array(block, np.uint64))


def list_runs(data: bytes) -> list[bytes]:
    """Return each run of five words of a text, without regard to case and space; all of a shorter text is one."""
    words = _WORD.findall(data.lower())
    return list({b" ".join(words[n : n + WORDS]) for n in range(max(1, len(words) - WORDS + 1))})


def hash_run(run: bytes) -> int:
    """Return a hash of 32 bits."""
    return zlib.crc32(run)


def _hash_bands(sketches: UInt64[ndarray, "texts hashes"]) -> UInt64[ndarray, "texts bands"]:
    """Return one hash of 64 bits for the hashes of each band."""
    rows = sketches.reshape(-1, BANDS, ROWS)
    result = np.full(rows.shape[:2], 0xCBF29CE484222325, np.uint64)
    for n in range(ROWS):
        result = (result ^ rows[..., n]) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(29)
    return result
