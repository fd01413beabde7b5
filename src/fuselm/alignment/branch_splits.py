"""Split a source's entries as a target's tokenizer does, after the text before them and before what may follow."""

import functools
import threading
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from fuselm.alignment.continuation import lengthen
from fuselm.alignment.followers import Followers
from fuselm.alignment.plain_spelling import PlainSpeller
from fuselm.models import bpe
from fuselm.models.chat.messages import END_OF_TURN
from fuselm.models.vocabulary import UNMAPPED, Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.system.compiling import compiled

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


class _Tail(NamedTuple):
    """Hold bytes that may change the splits of what they follow, and the first tokens of what comes after them.

    `is_cut` says that nothing is known after them.
    """

    joined: bytes
    is_cut: bool
    first_tokens: dict[int, float]  # with probabilities; `UNMAPPED` if the token is not known


class Splitter:
    """Split entries, and remember how: most are the same after any text, as no token has bytes of both."""

    def __init__(self, source: Vocabulary, target: Vocabulary, followers: Followers):
        self._source, self._target, self._followers = source, target, followers
        self._joined = _find_joined_bytes(target)
        self._lock = threading.Lock()
        self._spell = PlainSpeller(target).spell
        self._tails_of = functools.cache(self._find_tails)
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
        typed = [
            stream[target_begins[c] : b].tobytes() for c, b in zip(contexts.tolist(), begins.tolist(), strict=True)
        ]
        unseen = stream[:hidden].tobytes()
        with self._lock:
            if self._store.strings > MOST_SPLITS:
                self._forget()
            of_row = np.array([self._contexts.setdefault(t, len(self._contexts)) for t in typed], np.int64)
            if hidden:
                of_row[:1] = self._contexts.setdefault(None, len(self._contexts))
            keys = np.where(is_free, 0, of_row[rows]) << 32 | d.ids
            slots = np.full(len(d.ids), -1, np.int64)
            slots[has_text] = _find_places(self._table, self._places, keys[has_text])
            missing = np.unique(keys[has_text & (slots < 0)])
            if len(missing):
                self._split_strings(missing, unseen)
                slots[has_text] = _find_places(self._table, self._places, keys[has_text])
            splits = self._store.splits()
        return slots, np.where(is_free, within[rows], contexts[rows]), splits

    def _split_strings(self, keys: Int[ndarray, "keys"], unseen: bytes) -> None:
        """Split each string with all that may follow it, and remember the splits. The context `None` hides bytes."""
        contexts, strings, tails = list(self._contexts), [], []
        for key in keys.tolist():
            context, string = contexts[key >> 32], self._source.token_bytes[key & 0xFFFFFFFF] or b""
            if context is None:
                string = string[len(unseen) :] if string.startswith(unseen) else b""
            string = (context or b"") + string
            strings.append(string)
            tails.append(self._tails_of(key & 0xFFFFFFFF) if string else ())
        encoded = iter(self._spell([s + tail.joined for s, of in zip(strings, tails, strict=True) for tail in of]))
        places = []
        for string, of in zip(strings, tails, strict=True):
            merged: dict[tuple[int, ...], float] = {}
            for tail in of:
                size = len(string) + len(tail.joined)
                tokens, is_whole = self._cut(next(encoded), len(string), size, tail.is_cut)
                for first, weight in tail.first_tokens.items():
                    split = tokens if is_whole or first == UNMAPPED else (*tokens, first)
                    merged[split] = merged.get(split, 0.0) + weight
            places.append(self._store.add(merged))
        if 2 * self._store.strings > len(self._table):
            old = self._table != bpe.NOTHING
            known, at = self._table[old], self._places[old]
            self._table = bpe.make_table(4 * self._store.strings)
            self._places = np.zeros(len(self._table), np.int64)
            _insert(self._table, self._places, known, at)
        _insert(self._table, self._places, keys, np.array(places, np.int64))

    def _cut(self, encoded: tuple[int, ...], end: int, size: int, is_cut: bool) -> tuple[tuple[int, ...], bool]:
        """Return the tokens that begin before `end`, and the next one; tell whether no other may be put behind them.

        A last token is left out if what follows may make it longer.
        """
        tokens, reached = [], 0
        for token in encoded:
            follows = reached >= end
            reached += len(self._target.token_bytes[token] or b"") if token != UNMAPPED else 0
            if token == UNMAPPED or (is_cut and reached == size > end):
                return tuple(tokens), True
            tokens.append(token)
            if follows:
                return tuple(tokens), True
        return tuple(tokens), is_cut

    def _find_tails(self, token: int) -> list[_Tail]:
        """List what may follow a token."""
        followers, last = self._followers.of(token), (self._source.token_bytes[token] or b"")[-1:]
        parts = []
        for follower, weight in followers.items():
            size, string = 0, last + follower
            while size < len(follower) and (_IS_SPACE[string[size]] or self._joined[string[size], string[size + 1]]):
                size += 1
            parts.append((follower[:size], follower[size:], weight))
        firsts = self._spell([rest for _, rest, _ in parts])
        tails: dict[tuple[bytes, bool], _Tail] = {}
        for (joined, rest, weight), tokens in zip(parts, firsts, strict=True):
            is_cut = bool(joined) and not rest
            first = tokens[0] if len(tokens) > 1 or rest.endswith(END_OF_TURN) else UNMAPPED
            tail = tails.setdefault((joined, is_cut), _Tail(joined, is_cut, {}))
            tail.first_tokens[first] = tail.first_tokens.get(first, 0.0) + weight
        return list(tails.values())

    def _forget(self) -> None:
        self._contexts: dict[bytes | None, int] = {b"": 0}
        self._table = bpe.make_table(1 << 12)
        self._places = np.zeros(len(self._table), np.int64)
        self._store = _SplitStore()


class _SplitStore:
    """Grow the arrays of `Splits`; those that were given out before stay as they were."""

    def __init__(self) -> None:
        self.strings = self._split_count = self._token_count = 0
        self._first, self._weights = np.zeros(1024, np.int64), np.zeros(1024)
        self._token_first, self._tokens = np.zeros(1024, np.int64), np.zeros(1024, np.int32)

    def add(self, splits: dict[tuple[int, ...], float]) -> int:
        """Add one string's splits with their weights; return its place."""
        place = self.strings
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
        self.strings += 1
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


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _find_places(table: ndarray, places: ndarray, keys: ndarray) -> Int[ndarray, "keys"]:
    """Return where the splits of each key are, or -1."""
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
