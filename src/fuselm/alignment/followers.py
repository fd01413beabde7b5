"""Learn what comes after each token of a source; branches.py puts it after tokens that did not come.

The source's own rows say it: all of those that stand behind a token, on average, and not only the token that came
there. Where no rows are at hand, texts stand in for them.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm.alignment.plain_spelling import spell_words
from fuselm.models.chat.messages import END_OF_TURN, Dialogue
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Store, Trace

LEAST_BYTES, MOST_BYTES = 6, 40  # bytes that are kept of what follows; white space is followed to its end
MOST_FOLLOWERS = 32  # of one token
MOST_POOLED = 64  # tokens that go on with a word, or that do not, of one class
MOST_REMEMBERED = 32  # texts behind a token, and behind a pair of tokens
MOST_ENTRIES = 1 << 20  # of rows that are learned from
PRIOR = 2.0  # what tokens of the same class are followed by counts as much as this many rows
NOTHING = b""  # stands for all that changes no tokens before it
LONGEST_WORD_PART = 6  # characters that tell classes of letters apart

Shares = dict[int, float]  # weights of ids


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
        self._texts: dict[int | tuple[int, int], list[bytes]] = defaultdict(list)
        parts, left = [], MOST_ENTRIES
        for part in self._read(traces, texts):
            parts.append(part)
            left -= len(part.ids)
            if left <= 0:
                break
        self._own: dict[int, Shares] = defaultdict(dict)
        self._pools: dict[tuple, _Pool] = {}
        if parts:
            self._learn(_Entries(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))))
        self.of = functools.cache(self._find)

    def _read(self, traces: Store | Iterable[Trace], texts: Iterable[str | Dialogue]) -> Iterator[_Entries]:
        """Yield the entries of each document, and remember what stands behind its tokens."""
        has_traces = False
        for trace in traces:
            has_traces, d = True, trace.distributions
            self._remember(trace.tokens)
            probabilities = np.exp(d.logprobs.astype(np.float64))
            totals = np.bincount(d.rows, weights=probabilities, minlength=len(d))
            chosen = (d.rows > 0) & (totals[d.rows] > 0)
            rows = d.rows[chosen]
            yield self._drop_ends(_Entries(trace.tokens[rows - 1], d.ids[chosen], probabilities[chosen] / totals[rows]))
        for text in () if has_traces else texts:
            ids = self._source.segment(text).ids
            self._remember(ids)
            yield self._drop_ends(_Entries(ids[:-1], ids[1:], np.ones(max(len(ids) - 1, 0))))

    def _drop_ends(self, entries: _Entries) -> _Entries:
        """Drop what comes after the end of a turn, which nothing follows, and entries without text."""
        kept = [
            bool(b) and b != END_OF_TURN and bool(y)
            for b, y in zip(self._spell(entries.before), self._spell(entries.ids), strict=True)
        ]
        return _Entries(*(array[kept] for array in entries))

    def _spell(self, ids: Int[ndarray, "tokens"]) -> list[bytes]:
        return [self._token_bytes[i] or b"" for i in ids.tolist()]

    def _remember(self, tokens: Int[ndarray, "tokens"]) -> None:
        strings = self._spell(tokens)
        data = b"".join(strings)
        before = None
        for token, end in zip(tokens.tolist(), itertools.accumulate(map(len, strings)), strict=True):
            if follower := _cut_follower(data, end):
                for key in (token,) if before is None else (token, (before, token)):
                    if len(self._texts[key]) < MOST_REMEMBERED:
                        self._texts[key].append(follower)
            before = token

    def _learn(self, entries: _Entries) -> None:
        keys, place = np.unique(entries.before.astype(np.int64) << 32 | entries.ids, return_inverse=True)
        sums = np.bincount(place, weights=entries.shares, minlength=len(keys))
        pooled: dict[tuple, Shares] = defaultdict(dict)
        for before, token, share in zip(
            (keys >> 32).tolist(), (keys & 0xFFFFFFFF).tolist(), sums.tolist(), strict=True
        ):
            self._own[before][token] = share
        for before, own in self._own.items():
            _add(pooled[_classify(self._token_bytes[before])], own)
        kinds: dict[str, Shares] = defaultdict(dict)
        for (kind, *_), counts in pooled.items():
            _add(kinds[kind], counts)
        by_kind = {kind: _Pool.build(counts, self._token_bytes) for kind, counts in kinds.items()}
        for of, counts in pooled.items():
            self._pools[of] = by_kind[of[0]]._replace(
                rate=_sum_continuing(counts, self._token_bytes) / sum(counts.values())
            )
        for kind, pool in by_kind.items():  # for classes of which no token was seen
            self._pools[(kind,)] = pool

    def _find(self, token: int) -> dict[bytes, float]:
        """Return what may follow a token, with probabilities that sum to 1."""
        shares = self._borrow(token)
        if (own := self._own.get(token)) is not None:
            total_own = sum(own.values())
            share = total_own / (total_own + PRIOR) if shares else 1.0
            shares = {y: p * (1 - share) for y, p in shares.items()}
            for y, p in own.items():
                shares[y] = shares.get(y, 0.0) + p * share / total_own
        result: dict[bytes, float] = defaultdict(float)
        for y, draws in _draw(shares, self._token_bytes, MOST_FOLLOWERS).items():
            behind = self._texts.get((token, y)) or self._texts.get(y) or [NOTHING]
            few = behind[: max(round(draws), 1)]
            for text in few:
                result[(self._token_bytes[y] or b"") + text] += draws / len(few)
        total = sum(result.values())
        return {string: p / total for string, p in result.items()} if total else {NOTHING: 1.0}

    def _borrow(self, token: int) -> Shares:
        """Return what follows the tokens of the same class, without what would make another token with this one."""
        string = self._token_bytes[token]
        of = _classify(string)
        pool = self._pools.get(of) or self._pools.get(of[:1])
        if pool is None or not string:
            return {}
        separate = self._are_separate(token, pool)
        continuing = {y: p for y, p, kept in zip(pool.ids, pool.shares, separate, strict=True) if kept}
        total, rate = sum(continuing.values(), 0.0), pool.rate
        if not total:
            continuing, total, rate = {}, 1.0, 0.0
        result = {y: p * rate / total for y, p in continuing.items()}
        for y, p in pool.others.items():
            result[y] = result.get(y, 0.0) + p * (1 - rate)
        return result if pool.others or rate else {}

    def _are_separate(self, token: int, pool: "_Pool") -> list[bool]:
        """Tell for each of a pool's ids whether the tokenizer leaves it and `token` apart, one behind the other."""
        if self._source.merges is None:
            return [True] * len(pool.ids)
        string = self._token_bytes[token] or b""
        spelled = spell_words(self._source.merges, [string + (self._token_bytes[y] or b"") for y in pool.ids])
        return [ids == (token, y) for ids, y in zip(spelled, pool.ids, strict=True)]


class _Pool(NamedTuple):
    """Hold what follows the tokens of a class: with `rate`, one of `ids`, which go on with a word; else, `others`."""

    ids: list[int]
    shares: list[float]
    rate: float
    others: Shares

    @classmethod
    def build(cls, counts: Shares, token_bytes: Sequence[bytes | None]) -> "_Pool":
        continuing = {y: c for y, c in counts.items() if _continues_word(token_bytes[y])}
        others = {y: c for y, c in counts.items() if y not in continuing}
        ids = sorted(continuing, key=lambda y: (-continuing[y], y))[:MOST_POOLED]
        return cls(
            ids=ids,
            shares=[continuing[y] for y in ids],
            rate=sum(continuing.values()) / sum(counts.values()),
            others=_draw(others, token_bytes, MOST_POOLED, 1.0),
        )


def _add(sums: Shares, more: Shares) -> None:
    for y, weight in more.items():
        sums[y] = sums.get(y, 0.0) + weight


def _draw(counts: Shares, token_bytes: Sequence[bytes | None], most: int, total: float | None = None) -> Shares:
    """Return all ids or, if there are more than `most`, a systematic sample in alphabetical order; it sums to `most`.

    `total` is what it sums to instead.
    """
    ids = sorted(counts, key=lambda y: (token_bytes[y] or b"", y))
    weights = np.array([counts[y] for y in ids], np.float64)
    if not len(ids) or not weights.sum():
        return {}
    shares = weights / weights.sum()
    if len(ids) > most:
        index = np.searchsorted(np.cumsum(shares), (np.arange(most) + 0.5) / most).clip(max=len(ids) - 1)
        shares = np.bincount(index, minlength=len(ids)) / most
    scale = most if total is None else total
    return {y: float(p) * scale for y, p in zip(ids, shares, strict=True) if p > 0}


def _sum_continuing(counts: Shares, token_bytes: Sequence[bytes | None]) -> float:
    return sum((c for y, c in counts.items() if _continues_word(token_bytes[y])), 0.0)


def _continues_word(string: bytes | None) -> bool:
    return bool(string) and (string[:1].isalpha() or string[:1] >= b"\x80") and string != END_OF_TURN


def _cut_follower(data: bytes, begin: int) -> bytes:
    """Return some bytes from `begin` on that do not end in white space or inside a character, or end a turn.

    Nothing follows the end of a text or of a turn.
    """
    if data[begin - 1 : begin] == END_OF_TURN:
        return b""
    end = min(begin + LEAST_BYTES, len(data))
    while end < min(len(data), begin + MOST_BYTES) and data[end - 1 : end].isspace():
        end += 1
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    if (turn_ends := data.find(END_OF_TURN, begin, end)) >= 0:
        return data[begin : turn_ends + 1]
    return b"" if data[end - 1 : end].isspace() else data[begin:end]


def _classify(string: bytes | None) -> tuple:
    """Return the class of a token: the kind of its last character, and for letters how long a part of a word it is."""
    string = string or b""
    last = string[-1:]
    if last.isalpha() or last >= b"\x80":
        return "letter", string[:1].isspace(), min(len(string.strip()), LONGEST_WORD_PART)
    if last in (b"\n", b"\r"):
        return ("line end",)
    if last.isspace():
        return ("space" if string == b" " else "spaces",)
    return ("digit" if last.isdigit() else "other",)
