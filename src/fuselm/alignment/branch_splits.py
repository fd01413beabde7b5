"""Split a source's entries as a target's tokenizer does, after the text before them and before what may follow."""

import threading
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from fuselm.alignment.continuation import lengthen
from fuselm.alignment.followers import Followers
from fuselm.models.vocabulary import UNMAPPED, Vocabulary
from fuselm.stores.distributions import Distributions

MOST_BACK = 3  # target tokens before a row that an entry may change, in a word; and as many of white space before it
MOST_SPLITS = 1 << 20  # strings whose splits are remembered


class Splits(NamedTuple):
    """Hold how strings are split: string k has the splits `first[k]` to `first[k + 1]`, each with a weight.

    The tokens of split s are those from `token_first[s]` to `token_first[s + 1]`.
    """

    first: Int[ndarray, "_"]
    weights: Float[ndarray, "_"]
    token_first: Int[ndarray, "_"]
    tokens: Int[ndarray, "_"]


class Splitter:
    """Split entries, and remember how: most are the same after any text, as no token has bytes of both."""

    def __init__(self, source: Vocabulary, target: Vocabulary, followers: Followers):
        self._source, self._target, self._followers = source, target, followers
        self._joined = _find_joined_bytes(target)
        self._lock = threading.Lock()
        self._forget()

    def split(
        self,
        begins: Int[ndarray, "rows"],
        d: Distributions,
        within: Int[ndarray, "rows"],
        target_begins: Int[ndarray, "edges"],
        stream: UInt8[ndarray, "bytes"],
    ) -> tuple[Int[ndarray, "entries"], Int[ndarray, "entries"], Splits]:
        """Return each entry's place in the splits, or -1 without text; its first target token; and the splits.

        `within` has the target tokens that rows begin in or with.
        """
        contexts, rows = _find_contexts(stream, target_begins, within, begins), d.rows
        byte_offsets, packed = self._source.packed_bytes
        has_text = byte_offsets[d.ids + 1] > byte_offsets[d.ids]
        firsts = np.zeros(len(d.ids), np.uint8)
        firsts[has_text] = packed[byte_offsets[d.ids[has_text]]]
        before = stream[(begins - 1).clip(0)][rows]
        meets = (target_begins[within] == begins)[rows]
        is_free = meets & ~_IS_SPACE[before] & ~self._joined[before, firsts] | (begins == target_begins[contexts])[rows]
        hidden = max(int(target_begins[0] - begins[0]), 0)
        if hidden:
            is_free[: d.offsets[1]] = False
        with self._lock:
            if len(self._known) > MOST_SPLITS:
                self._forget()
            missing = [(b"", i) for i in np.unique(d.ids[is_free & has_text]).tolist() if self._by_id[i] < 0]
            bound = np.flatnonzero(~is_free & has_text)
            strings = [
                stream[target_begins[c] : b].tobytes() for c, b in zip(contexts.tolist(), begins.tolist(), strict=True)
            ]
            keys = [(strings[r], i) for r, i in zip(rows[bound].tolist(), d.ids[bound].tolist(), strict=True)]
            unseen = stream[:hidden].tobytes()
            if hidden:
                first_row = int((bound < d.offsets[1]).sum())
                keys[:first_row] = [(None, i) for _, i in keys[:first_row]]
            self._split_strings([key for key in dict.fromkeys(missing + keys) if key not in self._known], unseen)
            slots = np.where(is_free & has_text, self._by_id[d.ids], -1)
            slots[bound] = [self._known[key] for key in keys]
            splits = self._store.splits()
        return slots, np.where(is_free, within[rows], contexts[rows]), splits

    def _split_strings(self, keys: list[tuple[bytes | None, int]], unseen: bytes) -> None:
        """Split each string with all that may follow it, and remember the splits. The context `None` hides bytes."""
        strings, ends, weights, counts = [], [], [], []
        for context, token in keys:
            string = self._source.token_bytes[token] or b""
            if context is None:
                string = string[len(unseen) :] if string.startswith(unseen) else b""
            string = (context or b"") + string
            followers = self._followers.of(token) if string else {}
            strings += [string + follower for follower in followers]
            ends += [len(string)] * len(followers)
            weights += followers.values()
            counts.append(len(followers))
        encoded, place, token_bytes = self._target.encode_bytes(strings), 0, self._target.token_bytes
        for key, count in zip(keys, counts, strict=True):
            merged: dict[tuple[int, ...], float] = {}
            for k in range(place, place + count):
                tokens, reached, size = [], 0, len(strings[k])
                for token in encoded[k]:
                    follows = reached >= ends[k]
                    reached += len(token_bytes[token] or b"") if token != UNMAPPED else 0
                    if token == UNMAPPED or (reached == size > ends[k]):  # what follows may make this token longer
                        break
                    tokens.append(token)
                    if follows:
                        break
                merged[tuple(tokens)] = merged.get(tuple(tokens), 0.0) + weights[k]
            place += count
            self._remember(key, merged)

    def _remember(self, key: tuple[bytes | None, int], merged: dict[tuple[int, ...], float]) -> None:
        slot = self._store.add(merged)
        self._known[key] = slot
        if key[0] == b"":
            self._by_id[key[1]] = slot

    def _forget(self) -> None:
        self._known: dict[tuple[bytes | None, int], int] = {}
        self._by_id = np.full(self._source.size, -1, np.int64)
        self._store = _SplitStore()


class _SplitStore:
    """Grow the arrays of `Splits`; those that were given out before stay as they were."""

    def __init__(self) -> None:
        self._strings = self._split_count = self._token_count = 0
        self._first, self._weights = np.zeros(1024, np.int64), np.zeros(1024)
        self._token_first, self._tokens = np.zeros(1024, np.int64), np.zeros(1024, np.int32)

    def add(self, splits: dict[tuple[int, ...], float]) -> int:
        """Add one string's splits with their weights; return its place."""
        place = self._strings
        for tokens, weight in splits.items():
            s, t = self._split_count, self._token_count
            if s + 2 > len(self._weights):
                self._weights, self._token_first = lengthen(self._weights, 4 * s), lengthen(self._token_first, 4 * s)
            if t + len(tokens) > len(self._tokens):
                self._tokens = lengthen(self._tokens, 4 * (t + len(tokens)))
            self._tokens[t : t + len(tokens)] = tokens
            self._weights[s], self._token_first[s + 1] = weight, t + len(tokens)
            self._split_count, self._token_count = s + 1, t + len(tokens)
        if place + 2 > len(self._first):
            self._first = lengthen(self._first, 4 * place)
        self._first[place + 1] = self._split_count
        self._strings += 1
        return place

    def splits(self) -> Splits:
        return Splits(self._first, self._weights, self._token_first, self._tokens)


_IS_SPACE: Bool[ndarray, "256"] = np.array([bytes([b]).isspace() for b in range(256)])


def _find_joined_bytes(vocabulary: Vocabulary) -> Bool[ndarray, "256 256"]:
    """Tell for two bytes whether some token has one behind the other."""
    offsets, packed = vocabulary.packed_bytes
    joined, ends = np.zeros((256, 256), bool), np.zeros(len(packed) + 1, bool)
    ends[offsets[1:]] = True
    inside = ~ends[1:-1] if len(packed) > 1 else np.zeros(0, bool)
    joined[packed[:-1][inside], packed[1:][inside]] = True
    return joined


def _find_contexts(
    stream: UInt8[ndarray, "bytes"],
    target_begins: Int[ndarray, "edges"],
    within: Int[ndarray, "rows"],
    begins: Int[ndarray, "rows"],
) -> Int[ndarray, "rows"]:
    """Return the target token from which on each row's entries are split.

    That is the first of the word that is being spelled, with the white space before it, `MOST_BACK` tokens of each.
    """
    spaces = np.append(0, np.cumsum(_IS_SPACE[stream]))
    begin, end = target_begins[:-1], target_begins[1:]
    opens = _IS_SPACE[stream[begin.clip(0, len(stream) - 1)]]
    is_white = spaces[end] - spaces[begin] == end - begin
    context = np.where(begin[within] == begins, within - 1, within).clip(0)
    for _ in range(MOST_BACK):
        context = np.where((context > 0) & ~opens[context], context - 1, context)
    for _ in range(MOST_BACK):
        context = np.where((context > 0) & is_white[(context - 1).clip(0)], context - 1, context)
    return context
