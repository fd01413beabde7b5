"""Tell which of a target's tokens a word may become that a source has begun to spell, and how often.

What follows a token is learned from few rows (followers.py), but which words there are, the target's vocabulary knows.
A word that texts have counts as often as it came there. All others share what is left by their rank in the vocabulary,
which goes by how often they came when it was made (Zipf's law).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from fuselm.alignment.key_tables import KeyTable
from fuselm.alignment.plain_spelling import spell_words
from fuselm.alignment.spelling import join_sequences
from fuselm.models import bpe
from fuselm.models.chat.messages import END_OF_TURN
from fuselm.models.vocabulary import UNMAPPED, Vocabulary
from fuselm.system.compiling import compiled

LEAST_RANK = 32  # Zipf's law holds beyond the first ranks
LEAST_UNSEEN = 64.0  # tokens that words share which no text has
CHECKED = 512  # words on which a tokenizer is compared with its merges
LONGEST_WORD = 48  # bytes before a token that decide what it may become
HABITS = np.array([4.0, 5.0])  # of five words that go on, four become a token of the target, until texts say better


class WordTable(NamedTuple):
    """Hold where a token stands in words: by a key of it and of the bytes of the word before it, a group's number."""

    keys: Int[ndarray, "slots"]
    places: Int[ndarray, "slots"]
    is_letter: Bool[ndarray, "256"]
    joined: Bool[ndarray, "256 256"]  # bytes that some target token has beside each other


class Completions:
    """Hold for each beginning of a word, as far as source tokens spell it, the target's longer tokens with weights.

    Group g has the items `first[g]` to `first[g + 1]`. Item e is the bytes from `edges[e]` to `edges[e + 1]` of
    `packed`, which make the beginning, of `begun[e]` bytes, the token `words[e]` of the target. It weighs `weights[e]`.
    """

    def __init__(
        self,
        source: Vocabulary,
        target: Vocabulary,
        joined_bytes: Bool[ndarray, "256 256"],
        documents: Iterable[Int[ndarray, "_"]],
    ):
        words = _list_words(target)
        spelled_first, spelled = join_sequences(_spell(source, [target.token_bytes[w] or b"" for w in words.tolist()]))
        offsets, packed = target.packed_bytes
        keys, of, begins = _list_beginnings(
            words, offsets, packed, spelled_first, spelled, np.diff(source.packed_bytes[0]), _find_letters()
        )
        order = np.argsort(keys, kind="stable")
        keys, of, begins = keys[order], of[order], begins[order]
        groups, self.first = np.unique(keys, return_index=True)
        self.first = np.append(self.first, len(keys))
        table = KeyTable()
        table.add(groups)
        self.table = WordTable(*table.arrays, _find_letters(), joined_bytes)
        self.words, self.begun = of, begins
        self.edges, self.packed = _cut(offsets, packed, of, begins)
        came, habits = np.zeros(target.size), np.zeros((2, 2))
        for tokens in documents:
            self._count(source, target, tokens, came, habits)
        unseen = max(float((came == 1).sum()), LEAST_UNSEEN)
        self._of_token = came + unseen * _rank_words(target)
        self.weights: Float[ndarray, "items"] = self._of_token[of]
        self._sums = np.add.reduceat(self.weights, self.first[:-1]) if len(of) else np.zeros(1)
        self._target_ids = target.id_by_bytes
        # Of words that go on behind a token, so many become a token of the target with it; with those before it, too
        self.shares: Float[ndarray, "2"] = (habits[:, 0] + HABITS[0]) / (habits[:, 1] + HABITS[1])

    def find_rates(self, source: Vocabulary, tokens: Int[ndarray, "tokens"]) -> Float[ndarray, "tokens"]:
        """Return how often words go on behind tokens that begin them: NaN if the target has no such token."""
        ids = np.array(
            [self._target_ids.get(source.token_bytes[t] or b"", UNMAPPED) for t in tokens.tolist()], np.int64
        )
        alone = np.where(ids >= 0, self._of_token[ids.clip(0)], np.nan)
        groups = find_starts(self.table, tokens)
        longer = np.where(groups >= 0, self._sums[groups.clip(0)], 0.0) / self.shares[0]
        longer = np.maximum(longer, 1e-3 * alone)
        return longer / (longer + alone)

    def weigh(self, token: int) -> float:
        """Return the weight of a token of the target among those that have the same beginning."""
        return float(self._of_token[token])

    def _count(
        self,
        source: Vocabulary,
        target: Vocabulary,
        tokens: Int[ndarray, "_"],
        came: Float[ndarray, "_"],
        habits: Float[ndarray, "2 2"],
    ) -> None:
        """Count how often words of a text come, and how often those that go on become a token of the target."""
        strings = [source.token_bytes[t] or b"" for t in tokens.tolist()]
        data = b"".join(strings)
        try:
            texts = [turn.decode() for turn in data.split(END_OF_TURN)]
        except UnicodeDecodeError:
            return
        lengths, edges = np.diff(target.packed_bytes[0]), np.zeros(len(data) + 1, np.int64)
        at = 0
        for text in texts:
            segmentation = target.segment(text)
            came += np.bincount(segmentation.ids, minlength=len(came))
            starts = segmentation.starts.astype(np.int64)
            ends = starts + lengths[segmentation.ids]
            edges[at + starts.clip(0)] = at + ends.clip(0, segmentation.size)
            at += segmentation.size + 1
        ends = np.cumsum([len(s) for s in strings]).astype(np.int64)
        _count_habits(self.table, np.frombuffer(data, np.uint8), tokens.astype(np.int64), ends, edges, habits)


def _list_words(vocabulary: Vocabulary) -> Int[ndarray, "words"]:
    """List the tokens that are letters, maybe behind a space."""
    words = []
    for token, string in enumerate(vocabulary.token_bytes):
        if string and len(string) > 1:
            try:
                text = string.decode()
            except UnicodeDecodeError:
                continue
            if text.removeprefix(" ").isalpha():
                words.append(token)
    return np.array(words, np.int64)


def _spell(source: Vocabulary, words: list[bytes]) -> Sequence[Sequence[int]]:
    """Spell words in the source's tokens: by its merges, if they alone split words as it does."""
    tried = words[:: max(len(words) // CHECKED, 1)]
    if source.merges is not None and spell_words(source.merges, tried) == source.encode_bytes(tried):
        return spell_words(source.merges, words)
    return source.encode_bytes(words)


def _rank_words(target: Vocabulary) -> Float[ndarray, "vocabulary"]:
    """Return shares of all tokens by Zipf's law: those that merges make by rank, and the others by theirs."""
    ranks = np.arange(target.size)
    if target.merges is not None:
        pairs = target.merges.pairs[target.merges.pairs[:, 0] != bpe.NOTHING, 1]
        made, rank = pairs & 0xFFFFFFFF, pairs >> 32
        is_made = np.zeros(target.size, bool)
        is_made[made] = True
        ranks[~is_made] = np.arange((~is_made).sum())
        ranks[made] = rank
    shares = 1.0 / (LEAST_RANK + ranks)
    return shares / shares.sum()


def _find_letters() -> ndarray:
    """Tell of each byte whether it is a letter or a part of a character."""
    return np.array([bytes([b]).isalpha() or 0x80 <= b < END_OF_TURN[0] for b in range(256)])


def _cut(
    offsets: Int[ndarray, "_"], packed: UInt8[ndarray, "_"], words: Int[ndarray, "items"], begins: Int[ndarray, "items"]
) -> tuple[Int[ndarray, "edges"], UInt8[ndarray, "bytes"]]:
    """Return the bytes of each word from a byte of it on, joined, and where each begins."""
    lengths = offsets[words + 1] - offsets[words] - begins
    edges = np.append(0, np.cumsum(lengths)).astype(np.int64)
    places = np.repeat(offsets[words] + begins - edges[:-1], lengths) + np.arange(edges[-1])
    return edges, packed[places]


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _start_key(token: int) -> int:
    return np.int64(np.uint64(token + 1) * np.uint64(0x9E3779B97F4A7C15))


@compiled(nogil=True)
@no_type_check
def _lengthen_key(key: int, byte: int) -> int:
    """Return the key of the same token behind one more byte."""
    mixed = (np.uint64(key) ^ np.uint64(byte + 1)) * np.uint64(0xD6E8FEB86659FD93)
    return np.int64(mixed ^ (mixed >> np.uint64(29)))


@compiled(nogil=True)
@no_type_check
def _list_beginnings(
    words: ndarray,
    offsets: ndarray,
    packed: ndarray,
    spelled_first: ndarray,
    spelled: ndarray,
    lengths: ndarray,
    is_letter: ndarray,
) -> tuple[ndarray, ndarray, ndarray]:
    """Return for each place where a source token ends within a word its key, the word, and how many bytes are before.

    A place between a letter and another counts, and one within a character.
    """
    most = len(spelled)
    keys, of, begins, filled = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64), 0
    for w in range(len(words)):
        begin, size, at = offsets[words[w]], offsets[words[w] + 1] - offsets[words[w]], 0
        for s in range(spelled_first[w], spelled_first[w + 1] - 1):
            token = spelled[s]
            if token == UNMAPPED:
                break
            before, at = at, at + lengths[token]
            if at >= size or not is_letter[packed[begin + at - 1]] or not is_letter[packed[begin + at]]:
                continue
            key = _start_key(token)
            for k in range(before - 1, -1, -1):
                key = _lengthen_key(key, packed[begin + k])
            keys[filled], of[filled], begins[filled] = key & 0x7FFFFFFFFFFFFFFF, words[w], at
            filled += 1
    return keys[:filled].copy(), of[:filled].copy(), begins[:filled].copy()


@compiled(nogil=True)
@no_type_check
def find_group(table: WordTable, token: int, data: ndarray, end: int) -> tuple[int, int, int]:
    """Return the group of a token behind the first `end` bytes of `data`, and how many of those are of its word.

    The longest beginning of a word that the table has counts; the group of the next longest is returned, too. A group
    is -1 if there is none.
    """
    group, length, shorter, key, at = -1, 0, -1, _start_key(token), end
    while True:
        slot = bpe.find_slot(table.keys, key & 0x7FFFFFFFFFFFFFFF)
        if table.keys[slot] != bpe.NOTHING:
            group, length, shorter = table.places[slot], end - at, group
        if at == 0 or end - at == LONGEST_WORD or (at < end and not table.is_letter[data[at]]):
            return group, length, shorter
        at -= 1
        key = _lengthen_key(key, data[at])


@compiled(nogil=True)
@no_type_check
def find_starts(table: WordTable, tokens: ndarray) -> ndarray:
    """Return the group of each token where it begins a word, or -1."""
    groups = np.empty(len(tokens), np.int64)
    for n in range(len(tokens)):
        slot = bpe.find_slot(table.keys, _start_key(tokens[n]) & 0x7FFFFFFFFFFFFFFF)
        groups[n] = table.places[slot] if table.keys[slot] != bpe.NOTHING else -1
    return groups


@compiled(nogil=True)
@no_type_check
def find_groups(
    table: WordTable,
    contexts: ndarray,
    ids: ndarray,
    context_edges: ndarray,
    context_bytes: ndarray,
    offsets: ndarray,
    packed: ndarray,
) -> ndarray:
    """Return for each id behind its context the group, the next shorter one, and two flags.

    They tell whether bytes of the context belong to the word, and whether the id ends within a character.
    """
    found = np.empty((len(ids), 4), np.int64)
    for n in range(len(ids)):
        before = context_bytes[context_edges[contexts[n]] : context_edges[contexts[n] + 1]]
        found[n, 0], length, found[n, 1] = find_group(table, ids[n], before, len(before))
        found[n, 2] = length > 0
        own = packed[offsets[ids[n]] : offsets[ids[n] + 1]]
        found[n, 3] = _ends_within_character(before, own)
    return found


@compiled(nogil=True)
@no_type_check
def _ends_within_character(before: ndarray, own: ndarray) -> bool:
    for back in range(1, 4):
        if back > len(own) + len(before):
            return False
        byte = own[len(own) - back] if back <= len(own) else before[len(before) + len(own) - back]
        if byte & 0xC0 != 0x80:
            return back < (1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    return False


@compiled(nogil=True)
@no_type_check
def _goes_on(table: WordTable, last: int, next_: int) -> bool:
    return table.is_letter[last] and table.is_letter[next_] and table.joined[last, next_]


@compiled(nogil=True)
@no_type_check
def _count_habits(
    table: WordTable, data: ndarray, tokens: ndarray, ends: ndarray, token_ends: ndarray, habits: ndarray
) -> None:
    """Count words that go on behind a source's token, and those that become a token of the target with it.

    `token_ends` has at each byte where a target token begins the byte where it ends.
    """
    begin = 0
    for r in range(len(tokens)):
        end = ends[r]
        if begin < end < len(data) and _goes_on(table, data[end - 1], data[end]):
            group, length, _ = find_group(table, tokens[r], data, begin)
            if group >= 0:
                kind = 1 if length > 0 else 0
                habits[kind, 1] += 1
                habits[kind, 0] += token_ends[begin - length] > end
        begin = end
