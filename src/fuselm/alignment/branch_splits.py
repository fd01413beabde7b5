"""Split a source's entries as a target's tokenizer does, after the text before them and before what may follow."""

import itertools
import threading
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

from fuselm.alignment.branch_tails import TailFinder, Tails
from fuselm.alignment.continuation import lengthen
from fuselm.alignment.follower_draws import IS_SPACE
from fuselm.alignment.followers import Followers
from fuselm.alignment.key_tables import GrowingArray, KeyTable
from fuselm.alignment.plain_spelling import find_merges_of_words, is_plain
from fuselm.alignment.spelling import join_sequences
from fuselm.alignment.split_groups import group_splits
from fuselm.models import bpe
from fuselm.models.vocabulary import UNMAPPED, Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.system.compiling import compiled

MOST_BACK = 3  # target tokens before a row that an entry may change, in a word; and as many of white space before it
MOST_BYTES = 400 << 20  # of splits that are remembered


class Splits(NamedTuple):
    """Hold how strings are split: string k has the splits `first[k]` to `first[k + 1]`, each with a weight.

    The tokens of split s are those from `token_first[s]` to `token_first[s + 1]`. After them comes one of
    `next_tokens[next_first[s]:next_stop[s]]`, with the weights that sum to the split's, unless nothing is known.

    Splits with the same first token are beside each other: `alike[s]` of them from the first such split on, whose
    weights sum to `sums[s]`.
    """

    first: Int[ndarray, "_"]
    weights: Float[ndarray, "_"]
    token_first: Int[ndarray, "_"]
    tokens: Int[ndarray, "_"]
    next_first: Int[ndarray, "_"]
    next_stop: Int[ndarray, "_"]
    next_tokens: Int[ndarray, "_"]
    next_weights: Float[ndarray, "_"]
    alike: Int[ndarray, "_"]
    sums: Float[ndarray, "_"]


class _Strings(NamedTuple):
    """Hold the strings that are to be split: the text before, the source's token, and what may follow it.

    The first `hidden` bytes of a token are not in the string if its text before is number `hidden_context`.
    """

    contexts: Int[ndarray, "strings"]
    ids: Int[ndarray, "strings"]
    slots: Int[ndarray, "strings"]
    context_edges: Int[ndarray, "contexts+1"]
    context_bytes: UInt8[ndarray, "_"]
    offsets: Int[ndarray, "vocabulary+1"]
    packed: UInt8[ndarray, "_"]
    hidden_context: int
    hidden: UInt8[ndarray, "hidden"]


class Splitter:
    """Split entries, and remember how: most are the same after any text, as no token has bytes of both."""

    def __init__(self, source: Vocabulary, target: Vocabulary, followers: Followers):
        self._source, self._target = source, target
        self._tails = TailFinder(source, target, followers)
        self._merges = find_merges_of_words(target)
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
        is_joined = IS_SPACE[before] | self._tails.joined_bytes[before, firsts]
        is_free = (meets & ~is_joined) | (begins == target_begins[contexts])[rows]
        hidden = max(int(target_begins[0] - begins[0]), 0)
        if hidden:
            is_free[: d.offsets[1]] = False
        needs_context = np.zeros(len(begins), bool)
        needs_context[rows[~is_free & has_text]] = True
        split_rows, data = np.flatnonzero(needs_context), stream.tobytes()
        edges = zip(target_begins[contexts[split_rows]].tolist(), begins[split_rows].tolist(), strict=True)
        typed = [data[a:b] for a, b in edges]
        of_row = np.zeros(len(begins), np.int64)
        with self._lock:
            if self._table.nbytes + self._tails.nbytes + sum(array.nbytes for array in self._arrays) > MOST_BYTES:
                self._forget()
            numbers = list(map(self._contexts.get, typed))
            if None in numbers:
                numbers = list(map(self._number, typed))
            of_row[split_rows] = numbers
            if hidden:
                of_row[0] = self._number(None)
            keys = np.where(is_free, 0, of_row[rows]) << 32 | d.ids
            slots = np.full(len(d.ids), -1, np.int64)
            slots[has_text] = self._table.find(keys[has_text])
            missing = np.unique(keys[has_text & (slots < 0)])
            if len(missing):
                self._split_strings(missing, stream[:hidden])
                slots[has_text] = self._table.find(keys[has_text])
            splits = self._splits
        return slots, np.where(is_free, within[rows], contexts[rows]), splits

    def _split_strings(self, keys: Int[ndarray, "keys"], hidden: UInt8[ndarray, "hidden"]) -> None:
        """Split each string with all that may follow it, and remember the splits."""
        ids = keys & 0xFFFFFFFF
        slots, tails = self._tails.find(keys >> 32, ids, self._context_edges.items, self._context_bytes.items)
        strings = _Strings(
            contexts=keys >> 32,
            ids=ids,
            slots=slots,
            context_edges=self._context_edges.items,
            context_bytes=self._context_bytes.items,
            offsets=self._source.packed_bytes[0],
            packed=self._source.packed_bytes[1],
            hidden_context=self._contexts.get(None, -1),
            hidden=hidden,
        )
        others, edges = _list_others(strings, tails, self._merges is not None)
        whole, listed = others.tobytes(), edges.tolist()
        spelled = self._target.encode_bytes([whole[a:b] for a, b in itertools.pairwise(listed)])
        spelled_first, spelled_tokens = join_sequences(spelled)
        first, weights, token_first, tokens, next_first, next_stop, alike, sums = group_splits(
            *_split_all(
                strings,
                tails,
                self._merges is not None,
                self._merges or bpe.compile_merges((), {}, {}),
                spelled_first,
                spelled_tokens,
                np.diff(self._target.packed_bytes[0]),
            )
        )
        self._first.append(first[1:] + self._weights.count)
        self._token_first.append(token_first[1:] + self._tokens.count)
        for array, items in (
            (self._weights, weights),
            (self._tokens, tokens),
            (self._next_first, next_first),
            (self._next_stop, next_stop),
            (self._alike, alike),
            (self._sums, sums),
        ):
            array.append(items)
        self._table.add(keys)
        self._splits = Splits(
            first=self._first.items,
            weights=self._weights.items,
            token_first=self._token_first.items,
            tokens=self._tokens.items,
            next_first=self._next_first.items,
            next_stop=self._next_stop.items,
            next_tokens=tails.next_tokens,
            next_weights=tails.weights,
            alike=self._alike.items,
            sums=self._sums.items,
        )

    def _number(self, context: bytes | None) -> int:
        """Return the number of a text before entries. `None` stands for one whose last bytes entries begin with."""
        number = self._contexts.setdefault(context, len(self._contexts))
        if number == self._context_edges.count - 1:
            self._context_bytes.append(np.frombuffer(context or b"", np.uint8))
            self._context_edges.append(np.array([self._context_bytes.count]))
        return number

    def _forget(self) -> None:
        self._contexts: dict[bytes | None, int] = {b"": 0}
        self._context_edges, self._context_bytes = GrowingArray(np.int64, (0, 0)), GrowingArray(np.uint8)
        self._table = KeyTable()
        self._first, self._token_first = GrowingArray(np.int64, (0,)), GrowingArray(np.int64, (0,))
        self._weights, self._tokens = GrowingArray(np.float64), GrowingArray(np.int32)
        self._next_first, self._next_stop = GrowingArray(np.int64), GrowingArray(np.int64)
        self._alike, self._sums = GrowingArray(np.int64), GrowingArray(np.float64)
        self._arrays = (self._context_bytes, self._first, self._token_first, self._weights, self._tokens)
        self._arrays += (self._next_first, self._next_stop, self._alike, self._sums)
        self._tails.forget()
        numbers, shares = np.zeros(0, np.int64), np.zeros(0)
        self._splits = Splits(
            first=self._first.items,
            weights=shares,
            token_first=self._token_first.items,
            tokens=np.zeros(0, np.int32),
            next_first=numbers,
            next_stop=numbers,
            next_tokens=numbers,
            next_weights=shares,
            alike=numbers,
            sums=shares,
        )


def _find_contexts(
    stream: UInt8[ndarray, "bytes"],
    target_begins: Int[ndarray, "edges"],
    within: Int[ndarray, "rows"],
    begins: Int[ndarray, "rows"],
) -> Int[ndarray, "rows"]:
    """Return the target token from which on each row's entries are split.

    That is the first of the word that is being spelled, with the white space before it, `MOST_BACK` tokens of each.
    """
    spaces = np.append(0, np.cumsum(IS_SPACE[stream]))
    begin, end = target_begins[:-1], target_begins[1:]
    opens = IS_SPACE[stream[begin.clip(0, len(stream) - 1)]]
    is_white = spaces[end] - spaces[begin] == end - begin
    context = np.where(begin[within] == begins, within - 1, within).clip(0)
    for _ in range(MOST_BACK):
        context = np.where((context > 0) & ~opens[context], context - 1, context)
    for _ in range(MOST_BACK):
        context = np.where((context > 0) & is_white[(context - 1).clip(0)], context - 1, context)
    return context


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _write_string(strings: _Strings, n: int, result: ndarray) -> tuple[ndarray, int]:
    """Write the text before an entry and its own into `result`; return it, or a longer one, and the string's length.

    The length is 0 if the entry does not begin with the hidden bytes.
    """
    context, id_ = strings.contexts[n], strings.ids[n]
    begin, stop = strings.context_edges[context], strings.context_edges[context + 1]
    own, own_stop = strings.offsets[id_], strings.offsets[id_ + 1]
    if context == strings.hidden_context:
        for k in range(len(strings.hidden)):
            if own == own_stop or strings.packed[own] != strings.hidden[k]:
                return result, 0
            own += 1
    size = stop - begin + own_stop - own
    if size > len(result):
        result = lengthen(result, 2 * size)
    result[: stop - begin] = strings.context_bytes[begin:stop]
    result[stop - begin : size] = strings.packed[own:own_stop]
    return result, size


@compiled(nogil=True)
@no_type_check
def _write_joined(tails: Tails, tail: int, string: ndarray, end: int) -> tuple[ndarray, int]:
    """Write what a tail joins behind the first `end` bytes; return the array, or a longer one, and the length."""
    begin, stop = tails.edges[tails.joined[tail]], tails.edges[tails.joined[tail] + 1]
    if end + stop - begin > len(string):
        string = lengthen(string, 2 * (end + stop - begin))
    string[end : end + stop - begin] = tails.packed[begin:stop]
    return string, end + stop - begin


@compiled(nogil=True)
@no_type_check
def _is_word(tails: Tails, tail: int, end: int) -> bool:
    """Tell whether what a tail joins makes all `end` bytes before it a token of the target."""
    return tails.joined[tail] < len(tails.words) and tails.begun[tails.joined[tail]] == end


@compiled(nogil=True)
@no_type_check
def _list_others(strings: _Strings, tails: Tails, has_merges: bool) -> tuple[ndarray, ndarray]:
    """Return the bytes of all strings that merges alone cannot split, and where each begins, in order."""
    packed, edges, count, filled = np.empty(1024, np.uint8), np.zeros(1024, np.int64), 0, 0
    string = np.empty(1024, np.uint8)
    for n in range(len(strings.ids)):
        string, end = _write_string(strings, n, string)
        for tail in range(tails.first[strings.slots[n]], tails.first[strings.slots[n] + 1] if end else 0):
            if _is_word(tails, tail, end):
                continue
            string, size = _write_joined(tails, tail, string, end)
            if has_merges and is_plain(string[:size]):
                continue
            if tail > tails.first[strings.slots[n]] and tails.joined[tail] == tails.joined[tail - 1]:
                continue
            if filled + size > len(packed):
                packed = lengthen(packed, 2 * (filled + size))
            if count + 2 > len(edges):
                edges = lengthen(edges, 2 * len(edges))
            packed[filled : filled + size] = string[:size]
            filled += size
            count += 1
            edges[count] = filled
    return packed[:filled].copy(), edges[: count + 1].copy()


@compiled(nogil=True)
@no_type_check
def _split_all(
    strings: _Strings,
    tails: Tails,
    has_merges: bool,
    merges: bpe.Merges,
    spelled_first: ndarray,
    spelled: ndarray,
    lengths: ndarray,
) -> tuple[ndarray, ndarray, ndarray, ndarray, ndarray, ndarray]:
    """Return the fields of `Splits`, without those that are the tails'. `spelled` has the tokens of the others."""
    most, other = 0, 0
    for n in range(len(strings.ids)):
        most += tails.first[strings.slots[n] + 1] - tails.first[strings.slots[n]]
    first, weights, token_first = np.zeros(len(strings.ids) + 1, np.int64), np.empty(most), np.zeros(most + 1, np.int64)
    tokens, filled, splits = np.empty(4 * most + 64, np.int32), 0, 0
    next_first, next_stop = np.zeros(most, np.int64), np.zeros(most, np.int64)
    string, ids, ranked = np.empty(1024, np.uint8), np.empty(1024, np.int32), np.empty(1024, np.int64)
    for n in range(len(strings.ids)):
        string, end = _write_string(strings, n, string)
        count = 0
        for tail in range(tails.first[strings.slots[n]], tails.first[strings.slots[n] + 1] if end else 0):
            string, size = _write_joined(tails, tail, string, end)
            if size >= len(ids):
                ids, ranked = np.empty(2 * size, np.int32), np.empty(2 * size, np.int64)
            if _is_word(tails, tail, end):
                count, ids[0] = 1, tails.words[tails.joined[tail]]
            elif tail == tails.first[strings.slots[n]] or tails.joined[tail] != tails.joined[tail - 1]:
                if has_merges and is_plain(string[:size]):
                    count = bpe.encode(merges, string[:size], ids, ranked)
                else:
                    count = spelled_first[other + 1] - spelled_first[other]
                    ids[:count] = spelled[spelled_first[other] : spelled_first[other + 1]]
                    other += 1
            if filled + count > len(tokens):
                tokens = lengthen(tokens, 2 * (filled + count))
            reached, is_whole = 0, tails.is_cut[tail]
            # The tokens that begin before `end`, and the next one, which nothing after them changes. A last token is
            # left out if what follows may make it longer.
            for k in range(count):
                follows = reached >= end
                reached += lengths[ids[k]] if ids[k] >= 0 else 0
                if ids[k] == UNMAPPED or (tails.is_cut[tail] and reached == size and size > end):
                    is_whole = True
                    break
                tokens[filled] = ids[k]
                filled += 1
                if follows:
                    is_whole = True
                    break
            token_first[splits + 1] = filled
            weights[splits] = tails.weights[tails.begins[tail] : tails.begins[tail + 1]].sum()
            if not is_whole:
                next_first[splits], next_stop[splits] = tails.begins[tail], tails.begins[tail + 1]
            splits += 1
        first[n + 1] = splits
    return (
        first,
        weights[:splits].copy(),
        token_first[: splits + 1].copy(),
        tokens[:filled].copy(),
        next_first[:splits].copy(),
        next_stop[:splits].copy(),
    )
