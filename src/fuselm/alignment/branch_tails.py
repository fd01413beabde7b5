"""List what may follow a source's tokens, as far as it matters to how a target's tokenizer splits them."""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from fuselm.alignment.follower_draws import IS_SPACE
from fuselm.alignment.followers import Followers
from fuselm.alignment.key_tables import GrowingArray, KeyTable
from fuselm.alignment.plain_spelling import PlainSpeller
from fuselm.models.chat.messages import END_OF_TURN
from fuselm.models.vocabulary import UNMAPPED, Vocabulary
from fuselm.system.compiling import compiled


class Tails(NamedTuple):
    """Hold what may follow tokens: that of slot k are the tails `first[k]` to `first[k + 1]`.

    A tail joins bytes to a token, which may change how it is split: those of string `joined`. If it `is_cut`, nothing
    is known after them. Else the target's next token is one of those from `begins[tail]` to `begins[tail + 1]`, with
    weights, or `UNMAPPED` if it is not known.
    """

    first: Int[ndarray, "slots+1"]
    joined: Int[ndarray, "tails"]
    is_cut: Bool[ndarray, "tails"]
    begins: Int[ndarray, "tails+1"]
    next_tokens: Int[ndarray, "_"]
    weights: Float[ndarray, "_"]
    edges: Int[ndarray, "strings+1"]  # of the strings that are joined
    packed: UInt8[ndarray, "bytes"]


class TailFinder:
    """List what may follow tokens, each once."""

    def __init__(self, source: Vocabulary, target: Vocabulary, followers: Followers):
        self._source, self._followers, self._speller = source, followers, PlainSpeller(target)
        self.joined_bytes = _find_joined_bytes(target)
        self._slots = KeyTable()
        self._first, self._begins = GrowingArray(np.int64, (0,)), GrowingArray(np.int64, (0,))
        self._joined, self._is_cut = GrowingArray(np.int64), GrowingArray(np.bool_)
        self._next_tokens, self._weights = GrowingArray(np.int64), GrowingArray(np.float64)
        self._strings: dict[bytes, int] = {b"": 0}
        self._edges, self._packed = GrowingArray(np.int64, (0, 0)), GrowingArray(np.uint8)
        self._known = KeyTable()  # followers, by id, text, and whether the token before them joins them
        self._known_joined, self._known_cut = GrowingArray(np.int64), GrowingArray(np.bool_)
        self._known_next = GrowingArray(np.int64)

    def find(self, tokens: Int[ndarray, "tokens"]) -> tuple[Int[ndarray, "tokens"], Tails]:
        """Return the slot of each token, which must have text, and the tails of all slots."""
        slots = self._slots.find(tokens)
        if len(missing := np.unique(tokens[slots < 0])):
            self._add(missing)
            slots = self._slots.find(tokens)
        return slots, Tails(
            first=self._first.items,
            joined=self._joined.items,
            is_cut=self._is_cut.items,
            begins=self._begins.items,
            next_tokens=self._next_tokens.items,
            weights=self._weights.items,
            edges=self._edges.items,
            packed=self._packed.items,
        )

    def _add(self, tokens: Int[ndarray, "tokens"]) -> None:
        drawn = self._followers.draw(tokens)
        offsets, packed = self._source.packed_bytes
        last = packed[offsets[tokens + 1] - 1][np.repeat(np.arange(len(tokens)), np.diff(drawn.first))]
        opens = packed[offsets[drawn.ids.clip(0)]]
        is_joined = (drawn.ids >= 0) & (IS_SPACE[last] | self.joined_bytes[last, opens])
        keys = (drawn.ids + 1) << 32 | drawn.texts << 1 | is_joined
        found = self._known.find(keys)
        if len(missing := np.unique(keys[found < 0])):
            self._learn(missing)
            found = self._known.find(keys)
        first, joined, is_cut, begins, next_tokens, weights = _group_followers(
            drawn.first,
            drawn.weights,
            self._known_joined.items[found],
            self._known_cut.items[found],
            self._known_next.items[found],
        )
        self._first.append(first[1:] + self._joined.count)
        self._begins.append(begins[1:] + self._weights.count)
        self._joined.append(joined)
        self._is_cut.append(is_cut)
        self._next_tokens.append(next_tokens)
        self._weights.append(weights)
        self._slots.add(tokens)

    def _learn(self, keys: Int[ndarray, "keys"]) -> None:
        """Split followers into the bytes that join the token before them and the first target token of the rest."""
        joined, rests = [], []
        for key in keys.tolist():
            string = self._followers.spell((key >> 32) - 1, (key & 0xFFFFFFFF) >> 1)
            size = key & 1
            if size:
                while size < len(string) and (
                    IS_SPACE[string[size - 1]] or self.joined_bytes[string[size - 1], string[size]]
                ):
                    size += 1
            joined.append(string[:size])
            rests.append(string[size:])
        spelled = dict.fromkeys(rests)
        spelled = dict(zip(spelled, self._speller.spell(list(spelled)), strict=True))
        next_tokens = []
        for rest in rests:
            tokens = spelled[rest]
            next_tokens.append(tokens[0] if len(tokens) > 1 or rest.endswith(END_OF_TURN) else UNMAPPED)
        self._known.add(keys)
        self._known_joined.append(np.array([self._number(string) for string in joined], np.int64))
        self._known_cut.append(np.array([bool(j) and not r for j, r in zip(joined, rests, strict=True)], bool))
        self._known_next.append(np.array(next_tokens, np.int64))

    def _number(self, string: bytes) -> int:
        if (number := self._strings.setdefault(string, len(self._strings))) == self._edges.count - 1:
            self._packed.append(np.frombuffer(string, np.uint8))
            self._edges.append(np.array([self._packed.count]))
        return number


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _group_followers(
    first: ndarray, weights: ndarray, joined: ndarray, is_cut: ndarray, next_tokens: ndarray
) -> tuple[ndarray, ndarray, ndarray, ndarray, ndarray, ndarray]:
    """Return the fields `first` to `weights` of `Tails` for tokens whose followers are `first[n]` to `first[n + 1]`.

    Strings are in the order in which they first follow a token, as their numbers depend on what was asked before.
    """
    count, tails, filled = len(first) - 1, 0, 0
    tail_first, begins = np.zeros(count + 1, np.int64), np.zeros(len(joined) + 1, np.int64)
    tail_joined, tail_cut = np.empty(len(joined), np.int64), np.empty(len(joined), np.bool_)
    grouped_next, grouped_weights = np.empty(len(joined), np.int64), np.empty(len(joined))
    keys = is_cut.astype(np.int64) << 32 | (next_tokens + 1)
    for n in range(count):
        for place in range(first[n], first[n + 1]):
            same = first[n]
            while joined[same] != joined[place]:
                same += 1
            keys[place] |= (same - first[n]) << 33
        order = first[n] + np.argsort(keys[first[n] : first[n + 1]], kind="mergesort")
        before = np.int64(-1)
        for place in order:
            if before < 0 or keys[place] >> 32 != before >> 32:
                tail_joined[tails], tail_cut[tails] = joined[place], is_cut[place]
                tails += 1
            if keys[place] != before:
                grouped_next[filled], grouped_weights[filled] = next_tokens[place], 0.0
                filled += 1
            grouped_weights[filled - 1] += weights[place]
            begins[tails] = filled
            before = keys[place]
        tail_first[n + 1] = tails
    return (
        tail_first,
        tail_joined[:tails].copy(),
        tail_cut[:tails].copy(),
        begins[: tails + 1].copy(),
        grouped_next[:filled].copy(),
        grouped_weights[:filled].copy(),
    )


def _find_joined_bytes(vocabulary: Vocabulary) -> Bool[ndarray, "256 256"]:
    """Tell for two bytes whether some token has one behind the other."""
    offsets, packed = vocabulary.packed_bytes
    joined, ends = np.zeros((256, 256), bool), np.zeros(len(packed) + 1, bool)
    ends[offsets[1:]] = True
    inside = ~ends[1:-1] if len(packed) > 1 else np.zeros(0, bool)
    joined[packed[:-1][inside], packed[1:][inside]] = True
    return joined
