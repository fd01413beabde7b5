"""Order the documents of all passes into batches, in arrays of a few bytes a document.

Blocks of neighbours are shuffled, then the documents of some blocks at a time: a store's row groups are read as a
whole, so in this order they are read once a pass, not once a document. A corpus of few blocks is shuffled as a whole.
Within a window of some batches, documents of similar length are put into one batch.

Shuffles are those of `random.Random`, from the same random words, so a seed gives the same order at any size.
"""

import functools
import random
from collections.abc import Sequence
from typing import no_type_check

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.system.compiling import compiled

BATCH_DOCUMENTS = 4  # by default
WINDOW = 8  # documents of so many batches are grouped by length
BLOCK_TOKENS = 1 << 15  # neighbours of so many tokens are read together
MIXED_BLOCKS = 16  # documents of so many blocks are shuffled; a smaller corpus is shuffled as a whole
PASSES_KEPT = 2  # the order of so many passes is in memory


def order_documents(
    lengths: Sequence[int] | Int[ndarray, "documents"], *, passes: int, batch: int, seed: int
) -> Int[ndarray, "read"]:
    """Return the documents of all passes in training order: shuffled, with similar lengths in one batch."""
    order = Order(lengths, passes=passes, batch_documents=batch, pack_tokens=None, seed=seed)
    return np.concatenate([np.zeros(0, np.int32), *map(order.find_batch, range(len(order)))])


def shuffle_passes(
    lengths: Sequence[int] | Int[ndarray, "documents"], *, passes: int, seed: int
) -> Int[ndarray, "read"]:
    """Return the documents of all passes, shuffled."""
    shuffled = Shuffle(lengths, seed=seed)
    return np.concatenate([np.zeros(0, np.int32), *map(shuffled.order_pass, range(passes))])


class Shuffle:
    """Shuffle the documents of each pass: blocks of neighbours, and the documents of some blocks at a time."""

    def __init__(self, lengths: Sequence[int] | Int[ndarray, "documents"], *, seed: int):
        self.lengths = np.asarray(lengths, np.int32)
        self._seed = seed
        begins, _ = find_pack_begins(self.lengths, BLOCK_TOKENS, -1)
        self._edges = np.append(begins, len(self.lengths)).astype(np.int32)  # of blocks
        self.order_pass = functools.lru_cache(PASSES_KEPT)(self._order_pass)

    def _order_pass(self, number: int) -> Int[ndarray, "documents"]:
        words = _RandomWords(f"{self._seed} {number}")
        blocks = np.arange(len(self._edges) - 1, dtype=np.int32)
        if len(blocks) > MIXED_BLOCKS:
            blocks = words.sample(blocks)
        result = np.empty(len(self.lengths), np.int32)
        at = 0
        for begin in range(0, len(blocks), MIXED_BLOCKS):
            chosen = blocks[begin : begin + MIXED_BLOCKS]
            mixed = [np.arange(self._edges[b], self._edges[b + 1], dtype=np.int32) for b in chosen]
            sampled = words.sample(np.concatenate(mixed))
            result[at : at + len(sampled)] = sampled
            at += len(sampled)
        return result


class Order:
    """Say which documents each batch has, in all passes. What a batch has is computed when it is asked for.

    `len` counts the batches. They have `batch_documents` documents, or as many as fit `pack_tokens` tokens.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Int[ndarray, "documents"],
        *,
        passes: int,
        batch_documents: int | None,
        pack_tokens: int | None,
        seed: int,
    ):
        self._shuffle = Shuffle(lengths, seed=seed)
        self.lengths = self._shuffle.lengths
        self._seed, self._size = seed, batch_documents or BATCH_DOCUMENTS
        self._read = passes * len(self.lengths)  # documents of all passes
        self._begins = None if pack_tokens is None else self._find_packs(passes, pack_tokens)
        self._find_window = functools.lru_cache(PASSES_KEPT)(self._order_window)

    def __len__(self) -> int:
        return -(-self._read // self._size) if self._begins is None else len(self._begins)

    def find_batch(self, number: int) -> Int[ndarray, "batch"]:
        """Return the documents of a batch."""
        if self._begins is not None:
            end = self._begins[number + 1] if number + 1 < len(self._begins) else self._read
            return self._slice(int(self._begins[number]), int(end))
        window, place = divmod(number, WINDOW)
        return self._find_window(window)[place * self._size : (place + 1) * self._size]

    def count_tokens(self, batches: int) -> int:
        """Count the tokens of the first `batches` batches."""
        batches = min(batches, len(self))
        if self._begins is not None:
            return self._count_read(int(self._begins[batches]) if batches < len(self._begins) else self._read)
        whole = batches // WINDOW * WINDOW
        cut = [self.lengths[self.find_batch(n)] for n in range(whole, batches)]
        return self._count_read(min(whole * self._size, self._read)) + sum(int(some.sum()) for some in cut)

    def _count_read(self, documents: int) -> int:
        """Count the tokens of the first documents of all passes."""
        passes, rest = divmod(documents, max(len(self.lengths), 1))
        total = passes * int(self.lengths.sum(dtype=np.int64))
        if rest:
            total += int(self.lengths[self._shuffle.order_pass(passes)[:rest]].sum(dtype=np.int64))
        return total

    def _slice(self, begin: int, end: int) -> Int[ndarray, "_"]:
        """Return a stretch of the documents of all passes, as they are shuffled."""
        count = len(self.lengths)
        parts = [
            self._shuffle.order_pass(n)[max(begin - n * count, 0) : end - n * count]
            for n in range(begin // max(count, 1), -(-end // max(count, 1)))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int32), *parts])

    def _order_window(self, number: int) -> Int[ndarray, "_"]:
        begin = number * WINDOW * self._size
        window = self._slice(begin, min(begin + WINDOW * self._size, self._read))
        window = window[np.argsort(self.lengths[window], kind="stable")]
        whole = list(range(len(window) // self._size))
        random.Random(f"{self._seed} {begin}").shuffle(whole)
        cut = len(whole) * self._size
        return np.concatenate([window[:cut].reshape(-1, self._size)[whole].ravel(), window[cut:]])

    def _find_packs(self, passes: int, tokens: int) -> Int[ndarray, "batches"]:
        room, found = -1, [np.zeros(0, np.int64)]
        for n in range(passes):
            begins, room = find_pack_begins(self.lengths[self._shuffle.order_pass(n)], tokens, room)
            found.append(begins + n * len(self.lengths))
        return np.concatenate(found)


class _RandomWords:
    """Draw as `random.Random(seed)` does, many at a time."""

    def __init__(self, seed: str):
        *key, position = random.Random(seed).getstate()[1]
        self._generator = np.random.MT19937()
        self._generator.state = {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, np.uint32), "pos": position},
        }
        self._words = np.zeros(0, np.uint32)  # drawn, and not used yet

    def sample(self, items: Int[ndarray, "items"]) -> Int[ndarray, "items"]:
        """Return what `random.Random.sample(items, len(items))` does."""
        while True:
            result = np.empty_like(items)
            used = _sample(items.copy(), self._words, result)
            if used >= 0:
                self._words = self._words[used:]
                return result
            more = self._generator.random_raw(len(items) + 64).astype(np.uint32)
            self._words = np.concatenate([self._words, more])


@compiled(nogil=True)
@no_type_check
def _sample(pool: ndarray, words: ndarray, result: ndarray) -> int:
    """Fill `result` as `random.sample` does, and return how many words that took; -1 if there are too few."""
    at = 0
    for i in range(len(pool)):
        left = len(pool) - i
        bits = 0
        while left >> bits:
            bits += 1
        while True:
            if at == len(words):
                return -1
            chosen = np.int64(words[at]) >> (32 - bits)
            at += 1
            if chosen < left:
                break
        result[i] = pool[chosen]
        pool[chosen] = pool[left - 1]
    return at


def find_pack_begins(lengths: Int[ndarray, "documents"], tokens: int, room: int) -> tuple[Int[ndarray, "packs"], int]:
    """Cut documents into packs of at most `tokens` tokens each, or of one that is longer.

    Returns where packs begin, and the room that is left in the last one. `room` is what is left in the pack that is
    open, -1 if none is.
    """
    is_begin, left = _find_begins(lengths, tokens, room)
    return np.flatnonzero(is_begin), int(left)


@compiled(nogil=True)
@no_type_check
def _find_begins(lengths: ndarray, tokens: int, room: int) -> tuple[ndarray, int]:
    is_begin = np.zeros(len(lengths), np.bool_)
    is_open = room >= 0
    for i in range(len(lengths)):
        if not is_open or lengths[i] > room:
            is_begin[i] = True
            is_open, room = True, tokens
        room -= lengths[i]
    return is_begin, room
