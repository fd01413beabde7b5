"""Learn what comes after each token of a source; branches.py puts it after tokens that did not come.

The source's own rows say it: all of those that stand behind a token, on average, and not only the token that came
there. Where no rows are at hand, texts stand in for them. follower_draws.py draws from it, compiled.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray

from fuselm.alignment import separation
from fuselm.alignment.follower_draws import (
    MOST_POOLED,
    PRIOR,
    Drawn,
    Learned,
    cut_followers,
    draw_evenly,
    draw_followers,
)
from fuselm.models.chat.messages import END_OF_TURN, Dialogue
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Store, Trace

MOST_REMEMBERED = 32  # texts behind a token, and behind a pair of tokens
MOST_ENTRIES = 1 << 20  # of rows that are learned from
NOTHING = b""  # stands for all that changes no tokens before it
LONGEST_WORD_PART = 6  # characters that tell classes of letters apart
KINDS = ("letter", "line end", "space", "spaces", "digit", "other")  # of the last character of a token


class _Entries(NamedTuple):
    """Hold what may come after tokens: entry e comes after `before[e]`, with this share of its row."""

    before: Int[ndarray, "entries"]
    ids: Int[ndarray, "entries"]
    shares: Float[ndarray, "entries"]


class Followers:
    """Hold what follows each token of a source, with probabilities.

    A token that is seldom or never seen borrows from the tokens of its class: how often a word goes on behind it, and
    with which tokens, except for those that would make another token with it.
    """

    def __init__(self, source: Vocabulary, texts: Iterable[str | Dialogue], traces: Store | Iterable[Trace] = ()):
        self._source, self._token_bytes = source, source.token_bytes
        offsets, packed = source.packed_bytes
        self._has_text = offsets[1:] > offsets[:-1]
        self._ends_turn = np.zeros(source.size, bool)
        self._ends_turn[[i for i in np.flatnonzero(offsets[1:] - offsets[:-1] == 1) if packed[offsets[i]] == 0xFF]] = (
            True
        )
        documents, parts, left = [], [], MOST_ENTRIES
        for tokens, entries in self._read(traces, texts):
            documents.append(tokens)
            parts.append(entries)
            left -= len(entries.ids)
            if left <= 0:
                break
        nothing = _Entries(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        entries = _Entries(*(np.concatenate(arrays) for arrays in zip(nothing, *parts, strict=True)))
        self.documents = documents
        self._learned = self._learn(entries, self._remember(documents))

    def draw(self, tokens: Int[ndarray, "tokens"]) -> Drawn:
        """Return what may follow each of some tokens with text, each with probabilities that sum to 1."""
        classes = [self._class_of(t) for t in tokens.tolist()]
        kinds, rates = np.array([k for k, _ in classes], np.int64), np.array([r for _, r in classes], np.float64)
        return draw_followers(self._learned, self._find_separate(tokens, kinds), tokens, kinds, rates)

    def find_rates(self, tokens: Int[ndarray, "tokens"]) -> tuple[Float[ndarray, "tokens"], Float[ndarray, "tokens"]]:
        """Return how often words go on behind tokens of each one's class, and which share it borrows from its class.

        The rate is 0 for a token that does not end with a letter.
        """
        letter = KINDS.index("letter")
        classes = [(_classify(self._token_bytes[t])[0] == letter, self._class_of(t)[1]) for t in tokens.tolist()]
        rates = np.array([rate if is_word else 0.0 for is_word, rate in classes])
        sums = np.append(0.0, np.cumsum(self._learned.own_shares))
        own = sums[self._learned.own_first[tokens + 1]] - sums[self._learned.own_first[tokens]]
        return rates, PRIOR / (own + PRIOR)

    def spell(self, token: int, text: int) -> bytes:
        """Return the bytes of a token that follows, or of none if it is -1, and of the text behind it."""
        return (self._token_bytes[token] or b"" if token >= 0 else b"") + self.texts[text]

    def of(self, token: int) -> dict[bytes, float]:
        """Return what may follow a token, with probabilities that sum to 1."""
        result: dict[bytes, float] = defaultdict(float)
        drawn = self.draw(np.array([token], np.int64))
        for y, text, weight in zip(drawn.ids.tolist(), drawn.texts.tolist(), drawn.weights.tolist(), strict=True):
            result[self.spell(y, text)] += weight
        return dict(result)

    def _read(
        self, traces: Store | Iterable[Trace], texts: Iterable[str | Dialogue]
    ) -> Iterator[tuple[Int[ndarray, "tokens"], _Entries]]:
        """Yield the tokens of each document, and what may come after them."""
        has_traces = False
        for trace in traces:
            has_traces, d = True, trace.distributions
            probabilities, rows = np.exp(d.logprobs.astype(np.float64)), d.rows
            totals = np.bincount(rows, weights=probabilities, minlength=len(d))
            chosen = (rows > 0) & (totals[rows] > 0)
            rows = rows[chosen]
            yield (
                trace.tokens,
                self._drop_ends(_Entries(trace.tokens[rows - 1], d.ids[chosen], probabilities[chosen] / totals[rows])),
            )
        for text in () if has_traces else texts:
            ids = self._source.segment(text).ids
            yield ids, self._drop_ends(_Entries(ids[:-1], ids[1:], np.ones(max(len(ids) - 1, 0))))

    def _drop_ends(self, entries: _Entries) -> _Entries:
        """Drop what comes after the end of a turn, which nothing follows, and entries without text."""
        before, ids, _ = entries
        kept = self._has_text[before] & ~self._ends_turn[before] & self._has_text[ids]
        return _Entries(*(array[kept] for array in entries))

    def _remember(self, documents: Sequence[Int[ndarray, "_"]]) -> dict[str, ndarray]:
        """Return the texts behind tokens and behind pairs of tokens, some of each, in the fields of `Learned`."""
        offsets, packed = self._source.packed_bytes
        keys, spelled = [], []
        for tokens in documents:
            data, begins, ends = cut_followers(tokens, offsets, packed)
            there, before = np.flatnonzero(ends > begins), np.append(-1, tokens[:-1])[: len(tokens)].astype(np.int64)
            keys.append(np.stack([tokens[there].astype(np.int64), before[there]]))
            whole = data.tobytes()
            spelled += [whole[a:b] for a, b in zip(begins[there].tolist(), ends[there].tolist(), strict=True)]
        tokens, before = np.concatenate([np.zeros((2, 0), np.int64), *keys], axis=1)
        known = {NOTHING: 0}
        text_ids = np.array([known.setdefault(string, len(known)) for string in spelled], np.int64)
        self.texts = list(known)
        first, places = _group(tokens, self._source.size)
        paired = np.flatnonzero(before >= 0)
        pairs, of = np.unique(before[paired] << 32 | tokens[paired], return_inverse=True)
        pair_first, pair_places = _group(of, len(pairs))
        return {
            "text_first": first,
            "text_ids": text_ids[places],
            "pairs": pairs,
            "pair_first": pair_first,
            "pair_texts": text_ids[paired][pair_places],
        }

    def _learn(self, entries: _Entries, texts: dict[str, ndarray]) -> Learned:
        ids = np.array(
            sorted(np.unique(entries.ids).tolist(), key=lambda y: (self._token_bytes[y] or b"", y)), np.int64
        )
        place = np.zeros(self._source.size, np.int64)
        place[ids] = np.arange(len(ids))
        keys, of = np.unique(entries.before.astype(np.int64) << 32 | place[entries.ids], return_inverse=True)
        sums = np.bincount(of, weights=entries.shares, minlength=len(keys)).astype(np.float64)
        before, own_ids = keys >> 32, keys & 0xFFFFFFFF
        continues = np.array([_continues_word(self._token_bytes[y]) for y in ids.tolist()], bool)
        self._kinds: list[int | None] = [None] * len(KINDS)
        counted = self._count_classes(before, own_ids, sums, continues)
        pools: list[tuple[ndarray, ...]] = []
        for kind, counts in counted.items():
            self._kinds[kind] = len(pools)
            pools.append(_build_pool(counts, ids, continues))
        pool_first, other_first = (np.cumsum([0, *(len(pool[k]) for pool in pools)]) for k in (0, 2))
        joined = [np.concatenate([np.zeros(0), *(pool[k] for pool in pools)]) for k in range(4)]
        self._pool_ids = [ids[pool[0]] for pool in pools]
        return Learned(
            ids=ids,
            own_first=np.searchsorted(before, np.arange(self._source.size + 1)),
            own_ids=own_ids,
            own_shares=sums,
            pool_first=pool_first,
            pool_ids=joined[0].astype(np.int64),
            pool_shares=joined[1],
            other_first=other_first,
            other_ids=joined[2].astype(np.int64),
            other_shares=joined[3],
            **texts,
        )

    def _count_classes(
        self,
        before: Int[ndarray, "keys"],
        ids: Int[ndarray, "keys"],
        sums: Float[ndarray, "keys"],
        continues: Bool[ndarray, "known"],
    ) -> dict[int, Float[ndarray, "known"]]:
        """Return what follows each kind of token; remember how often a word goes on behind each class of tokens."""
        tokens, of = np.unique(before, return_inverse=True)
        classes = [_classify(self._token_bytes[t]) for t in tokens.tolist()]
        named = list(dict.fromkeys(classes))
        by_token = np.array([named.index(c) for c in classes], np.int64)
        totals = np.bincount(by_token[of], weights=sums, minlength=len(named))
        continuing = np.bincount(by_token[of], weights=sums * continues[ids], minlength=len(named))
        self._rates = {c: float(k / n) for c, k, n in zip(named, continuing, totals, strict=True)}
        result = {}
        for kind in dict.fromkeys(c[0] for c in named):
            chosen = np.array([c[0] == kind for c in named], bool)[by_token][of]
            result[kind] = np.bincount(ids[chosen], weights=sums[chosen], minlength=len(continues))
            self._rates.setdefault((kind,), float(result[kind][continues].sum() / result[kind].sum()))
        return result

    def _class_of(self, token: int) -> tuple[int, float]:
        """Return which pool a token borrows from, or -1, and how often a word goes on behind tokens of its class."""
        of = _classify(self._token_bytes[token])
        pool = self._kinds[of[0]]
        if pool is None or not self._token_bytes[token]:
            return -1, 0.0
        return pool, self._rates[of if of in self._rates else of[:1]]

    def _find_separate(
        self, tokens: Int[ndarray, "tokens"], kinds: Int[ndarray, "tokens"]
    ) -> Bool[ndarray, "tokens pooled"]:
        """Tell for each id of a token's pool whether the tokenizer leaves it and the token apart."""
        result = np.ones((len(tokens), MOST_POOLED), bool)
        if self._source.merges is None:
            return result
        for kind, ids in enumerate(self._pool_ids):
            chosen = np.flatnonzero(kinds == kind)
            result[chosen, : len(ids)] = separation.find_separate(
                self._source.merges, *self._source.packed_bytes, tokens[chosen], ids
            )
        return result


def _group(keys: Int[ndarray, "items"], size: int) -> tuple[Int[ndarray, "firsts"], Int[ndarray, "places"]]:
    """Return the places of the first `MOST_REMEMBERED` items of each key, and where each key's begin."""
    order = np.argsort(keys, kind="stable")
    rank = np.arange(len(keys)) - np.searchsorted(keys[order], keys[order])
    order = order[rank < MOST_REMEMBERED]
    return np.searchsorted(keys[order], np.arange(size + 1)), order


def _build_pool(
    counts: Float[ndarray, "known"], ids: Int[ndarray, "known"], continues: Bool[ndarray, "known"]
) -> tuple[Shaped[ndarray, "_"], ...]:
    """Return which ids go on with a word after tokens of a kind and how often, and shares of the others."""
    going_on = np.flatnonzero((counts > 0) & continues)
    going_on = going_on[np.lexsort((ids[going_on], -counts[going_on]))][:MOST_POOLED]
    others = np.flatnonzero((counts > 0) & ~continues)
    draws = draw_evenly(counts[others], MOST_POOLED) / MOST_POOLED
    return going_on, counts[going_on], others[draws > 0], draws[draws > 0]


def _continues_word(string: bytes | None) -> bool:
    return bool(string) and (string[:1].isalpha() or string[:1] >= b"\x80") and string != END_OF_TURN


def _classify(string: bytes | None) -> tuple[int, ...]:
    """Return the class of a token: the kind of its last character, and for letters how long a part of a word it is."""
    string = string or b""
    last = string[-1:]
    if last.isalpha() or last >= b"\x80":
        return KINDS.index("letter"), int(string[:1].isspace()), min(len(string.strip()), LONGEST_WORD_PART)
    if last in (b"\n", b"\r"):
        return (KINDS.index("line end"),)
    if last.isspace():
        return (KINDS.index("space" if string == b" " else "spaces"),)
    return (KINDS.index("digit" if last.isdigit() else "other"),)
