"""List what may follow a source's tokens, as far as it matters to how a target's tokenizer splits them."""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from fuselm.alignment import completions
from fuselm.alignment.completions import Completions
from fuselm.alignment.follower_draws import IS_SPACE, PRIOR, draw_evenly
from fuselm.alignment.followers import Followers
from fuselm.alignment.key_tables import GrowingArray, KeyTable
from fuselm.alignment.plain_spelling import PlainSpeller
from fuselm.models.chat.messages import END_OF_TURN
from fuselm.models.vocabulary import UNMAPPED, Vocabulary
from fuselm.system.compiling import compiled

FEW_ROWS = 16.0  # from so many rows behind a token on, what they say counts more than which words there are
MOST_WORDS, WORDS_DRAWN = 24, 8  # that complete a beginning: the most frequent, and so many that stand for all others


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
    words: Int[ndarray, "completing"]  # tokens that the first strings complete
    begun: Int[ndarray, "completing"]  # bytes of them that are before


class TailFinder:
    """List what may follow tokens, each once."""

    def __init__(self, source: Vocabulary, target: Vocabulary, followers: Followers):
        self._source, self._followers, self._speller = source, followers, PlainSpeller(target)
        self.joined_bytes = _find_joined_bytes(target)
        self.completions = Completions(source, target, self.joined_bytes, followers.documents)
        # The strings that complete words come first, then the empty one
        completing = self.completions.edges
        self._empty = len(completing) - 1
        self._strings: dict[bytes, int] = {b"": self._empty}
        self._edges, self._packed = GrowingArray(np.int64), GrowingArray(np.uint8)
        self._edges.append(np.append(completing, completing[-1]))
        self._packed.append(self.completions.packed)
        self._goes_on = GrowingArray(np.bool_)
        self._goes_on.append(np.append(np.ones(self._empty, bool), False))
        self._known = KeyTable()  # followers, by id, text, and whether the token before them joins them
        self._known_joined, self._known_cut = GrowingArray(np.int64), GrowingArray(np.bool_)
        self._known_next = GrowingArray(np.int64)
        self.forget()

    def forget(self) -> None:
        """Drop the tails of all tokens."""
        self._slots = KeyTable()
        self._first, self._begins = GrowingArray(np.int64, (0,)), GrowingArray(np.int64, (0,))
        self._joined, self._is_cut = GrowingArray(np.int64), GrowingArray(np.bool_)
        self._next_tokens, self._weights = GrowingArray(np.int64), GrowingArray(np.float64)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tails."""
        arrays = (self._first, self._begins, self._joined, self._is_cut, self._next_tokens, self._weights)
        return self._slots.nbytes + sum(array.nbytes for array in arrays)

    def find(
        self,
        contexts: Int[ndarray, "tokens"],
        tokens: Int[ndarray, "tokens"],
        context_edges: Int[ndarray, "edges"],
        context_bytes: UInt8[ndarray, "_"],
    ) -> tuple[Int[ndarray, "tokens"], Tails]:
        """Return the slot of each token behind its context, and the tails of all slots. Tokens must have text."""
        of_words = completions.find_groups(
            self.completions.table, contexts, tokens, context_edges, context_bytes, *self._source.packed_bytes
        )
        keys = (of_words[:, 0] + 1) << 32 | tokens
        slots = self._slots.find(keys)
        missing, first = np.unique(keys[slots < 0], return_index=True)
        if len(missing):
            self._add(missing, of_words[slots < 0][first])
            slots = self._slots.find(keys)
        return slots, Tails(
            first=self._first.items,
            joined=self._joined.items,
            is_cut=self._is_cut.items,
            begins=self._begins.items,
            next_tokens=self._next_tokens.items,
            weights=self._weights.items,
            edges=self._edges.items,
            packed=self._packed.items,
            words=self.completions.words,
            begun=self.completions.begun,
        )

    def _add(self, keys: Int[ndarray, "keys"], of_words: Int[ndarray, "keys 4"]) -> None:
        tokens, of = np.unique(keys & 0xFFFFFFFF, return_inverse=True)
        grouped = self._group_followers(tokens)
        stands_alone = of_words[:, 2] == 0
        shifts = np.where(stands_alone, self._shift_rates(tokens)[of], 0.0)
        own = PRIOR / self._followers.find_rates(tokens)[1] - PRIOR
        trusts = (FEW_ROWS / (own + FEW_ROWS))[of]
        first, joined, is_cut, begins, next_tokens, weights = _complete_words(
            of,
            of_words,
            shifts,
            trusts,
            *grouped,
            self._goes_on.items,
            self.completions.first,
            self.completions.weights,
            self.completions.shares,
        )
        self._first.append(first[1:] + self._joined.count)
        self._begins.append(begins[1:] + self._weights.count)
        self._joined.append(joined)
        self._is_cut.append(is_cut)
        self._next_tokens.append(next_tokens)
        self._weights.append(weights)
        self._slots.add(keys)

    def _shift_rates(self, tokens: Int[ndarray, "tokens"]) -> Float[ndarray, "tokens"]:
        """Return how much more often words go on behind tokens that begin them than followers say.

        Of what a token borrows from its class, half (in logits) is what the target's words say.
        """
        rates, borrowed = self._followers.find_rates(tokens)
        of_words = self.completions.find_rates(self._source, tokens)
        chosen = (rates > 0) & (rates < 1) & np.isfinite(of_words)
        both = rates[chosen] / (1 - rates[chosen]) * (of_words[chosen] / (1 - of_words[chosen]))
        shifts = np.zeros(len(tokens))
        shifts[chosen] = borrowed[chosen] * (np.sqrt(both) / (1 + np.sqrt(both)) - rates[chosen])
        return shifts

    def _group_followers(self, tokens: Int[ndarray, "tokens"]) -> tuple[ndarray, ...]:
        """Return what follows tokens, whatever is before them, in the fields `first` to `weights` of `Tails`."""
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
        return _group_followers(
            drawn.first,
            drawn.weights,
            self._known_joined.items[found],
            self._known_cut.items[found],
            self._known_next.items[found],
        )

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
        number = self._strings.setdefault(string, self._empty + len(self._strings))
        if number == self._edges.count - 1:
            self._packed.append(np.frombuffer(string, np.uint8))
            self._edges.append(np.array([self._packed.count]))
            self._goes_on.append(np.array([self.completions.table.is_letter[string[0]]]))
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


@compiled(nogil=True)
@no_type_check
def _complete_words(
    of: ndarray,
    of_words: ndarray,
    shifts: ndarray,
    trusts: ndarray,
    first: ndarray,
    joined: ndarray,
    is_cut: ndarray,
    begins: ndarray,
    next_tokens: ndarray,
    weights: ndarray,
    goes_on: ndarray,
    group_first: ndarray,
    word_weights: ndarray,
    shares: ndarray,
) -> tuple[ndarray, ndarray, ndarray, ndarray, ndarray, ndarray]:
    """Return the fields `first` to `weights` of `Tails` for tokens behind contexts, from those of their tokens `of`.

    Of what goes on with a word, a share completes it (completions.py). Nothing else follows part of a character.
    """
    most_tails, most_next = 0, 0
    for n in range(len(of)):
        most_tails += first[of[n] + 1] - first[of[n]] + 2 * MOST_WORDS
        most_next += begins[first[of[n] + 1]] - begins[first[of[n]]] + 2 * MOST_WORDS
    new_first, new_begins = np.zeros(len(of) + 1, np.int64), np.zeros(most_tails + 1, np.int64)
    new_joined, new_cut = np.empty(most_tails, np.int64), np.empty(most_tails, np.bool_)
    new_next, new_weights = np.empty(most_next, np.int64), np.empty(most_next)
    tails, filled = 0, 0
    for n in range(len(of)):
        group, shorter, is_open = of_words[n, 0], of_words[n, 1], of_words[n, 3]
        going_on, all_of_it = 0.0, 0.0
        for tail in range(first[of[n]], first[of[n] + 1]):
            mass = weights[begins[tail] : begins[tail + 1]].sum()
            all_of_it += mass
            going_on += mass if goes_on[joined[tail]] else 0.0
        longer, other = 1.0, 1.0  # factors of what goes on, and of what does not
        if shifts[n] != 0.0 and 0.0 < going_on < all_of_it:
            shifted = min(max(going_on + shifts[n], 1e-3 * going_on), 0.999 * all_of_it)
            longer, other = shifted / going_on, (all_of_it - shifted) / (all_of_it - going_on)
            going_on = shifted
        share, shorter_share = 0.0, 0.0
        if group >= 0:
            share = shares[of_words[n, 2]] * (1.0 if is_open else trusts[n])
            if shorter >= 0:
                shorter_share = (1.0 - share) * (1.0 if is_open else shares[0] * trusts[n])
            elif is_open:
                share = 1.0
        if group >= 0 and is_open:
            going_on = all_of_it
        rest = 1.0 - share - shorter_share
        for tail in range(first[of[n]], first[of[n] + 1]):
            factor = longer * rest if goes_on[joined[tail]] else 0.0 if is_open and group >= 0 else other
            if factor <= 0.0:
                continue
            new_joined[tails], new_cut[tails] = joined[tail], is_cut[tail]
            for k in range(begins[tail], begins[tail + 1]):
                new_next[filled], new_weights[filled] = next_tokens[k], factor * weights[k]
                filled += 1
            tails += 1
            new_begins[tails] = filled
        if going_on > 0.0:
            for chosen, mass in ((group, share * going_on), (shorter, shorter_share * going_on)):
                if mass <= 0.0:
                    continue
                shares_of_words = _choose_words(word_weights[group_first[chosen] : group_first[chosen + 1]])
                for k in range(len(shares_of_words)):
                    if shares_of_words[k] > 0:
                        new_joined[tails], new_cut[tails] = group_first[chosen] + k, False
                        new_next[filled], new_weights[filled] = UNMAPPED, mass * shares_of_words[k]
                        filled += 1
                        tails += 1
                        new_begins[tails] = filled
        new_first[n + 1] = tails
    return (
        new_first,
        new_joined[:tails].copy(),
        new_cut[:tails].copy(),
        new_begins[: tails + 1].copy(),
        new_next[:filled].copy(),
        new_weights[:filled].copy(),
    )


@compiled(nogil=True)
@no_type_check
def _choose_words(weights: ndarray) -> ndarray:
    """Return shares that sum to 1: the own ones of the heaviest words, and those of all others on a few of them."""
    shares = weights / weights.sum()
    if len(weights) <= MOST_WORDS:
        return shares
    light = np.argsort(-weights, kind="mergesort")[MOST_WORDS - WORDS_DRAWN :]
    light.sort()
    shares[light] = shares[light].sum() * draw_evenly(weights[light], WORDS_DRAWN) / WORDS_DRAWN
    return shares


def _find_joined_bytes(vocabulary: Vocabulary) -> Bool[ndarray, "256 256"]:
    """Tell for two bytes whether some token has one behind the other."""
    offsets, packed = vocabulary.packed_bytes
    joined, ends = np.zeros((256, 256), bool), np.zeros(len(packed) + 1, bool)
    ends[offsets[1:]] = True
    inside = ~ends[1:-1] if len(packed) > 1 else np.zeros(0, bool)
    joined[packed[:-1][inside], packed[1:][inside]] = True
    return joined
