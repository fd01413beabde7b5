"""Compare the probability that rows give to kinds of tokens with their frequency in text that the source wrote.

Fidelity measures only the token that came. This measures everything a row says: over text drawn from the source itself,
the mass that rows give to a class of tokens equals on average the share of tokens of this class, if the rows are the
source's own conditionals. Whatever a row took from the token that came shows up as a ratio other than 1.

A class may depend on a token and on the text before it, but never on the text after it, because such a class would
select texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from fuselm.alignment import continuation, span_losses
from fuselm.alignment.continuation import RowStarts
from fuselm.models.chat.messages import END_OF_TURN, Dialogue
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Trace

# How the source splits the text typed so far and the token: it has the same token, or several tokens, or a token that
# begins before it.
RELATIONS = ("one_source_token", "several_source_tokens", "crossing_source_tokens")
PARTS, ENDS = "parts_of_characters", "ends_of_turns"
KINDS = (*span_losses.CATEGORIES[: span_losses.CATEGORIES.index("unknown_tokens")], PARTS, ENDS)
BEYOND = "beyond_the_kept"  # tokens that the source spells with a token it did not keep
CELLS = len(RELATIONS) * len(KINDS) + 1
MOST_TYPED_BYTES = 16  # bytes before a token, at most, that decide how the source splits it
LAST_BYTES = 16  # bytes at the end of a text, which are skipped: their split depends on what would follow, unless
# a turn ends there
LEAST_TOKENS = 200  # tokens that a class needs to be judged
RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionalCounts:
    """Hold one text's tokens by cell: a relation and a kind, or, in the last cell, tokens beyond the kept ids."""

    domain: str
    predicted: Float[ndarray, "cells"]  # mass that rows give
    observed: Int[ndarray, "cells"]  # tokens that came


class ConditionalCounter:
    """Count texts of one source in the tokens of one target."""

    def __init__(self, source: Vocabulary, target: Vocabulary):
        self._source, self._target = source, target
        self._kinds = np.array([_classify_token(b) for b in target.token_bytes])
        self._lengths = np.diff(source.packed_bytes[0])

    def count(
        self, trace: Trace, aligned: Trace, text: str | Dialogue, *, domain: str, begin: int = 0
    ) -> ConditionalCounts:
        """Count the tokens that begin at byte `begin` or later, except those at the end.

        `trace` has the source's rows, and `aligned` has the rows that are judged.
        """
        d, starts = aligned.distributions, aligned.starts
        chosen, ends = self._choose(aligned, begin, text.encode())
        known = _find_kept_tokens(trace, starts[chosen], ends[chosen])
        rows = _append_gold(d, aligned.tokens, chosen)
        cells = self._find_cells(rows, starts[chosen], text.encode())
        owner = np.repeat(np.arange(len(chosen)), rows.counts)
        masses = np.exp(rows.logprobs.astype(np.float64))
        is_gold = np.zeros(len(masses), bool)
        is_gold[rows.offsets[1:] - 1] = True
        masses[is_gold] = 0.0
        masses[~is_gold & ~known[owner] & (rows.ids == aligned.tokens[chosen][owner])] = 0.0
        predicted = np.bincount(cells, weights=masses, minlength=CELLS).astype(np.float64)  # integers if it is empty
        predicted[-1] += len(chosen) - masses.sum()
        observed = np.bincount(np.where(known, cells[is_gold], CELLS - 1), minlength=CELLS)
        return ConditionalCounts(domain=domain, predicted=predicted, observed=observed)

    def classify(
        self, aligned: Trace, text: str | Dialogue, *, begin: int = 0
    ) -> tuple[Int[ndarray, "chosen"], Int[ndarray, "chosen"], Int[ndarray, "chosen"]]:
        """Return which tokens `count` counts, and of each that came its place in `RELATIONS` and in `KINDS`."""
        chosen, _ = self._choose(aligned, begin, text.encode())
        rows = _append_gold(aligned.distributions, aligned.tokens, chosen)
        cells = self._find_cells(rows, aligned.starts[chosen], text.encode())[rows.offsets[1:] - 1]
        return chosen, cells // len(KINDS), cells % len(KINDS)

    def _choose(self, aligned: Trace, begin: int, data: bytes) -> tuple[Int[ndarray, "chosen"], Int[ndarray, "tokens"]]:
        """Return which tokens are counted, and where every token ends."""
        starts = aligned.starts
        ends = np.append(starts[1:], aligned.size)[: len(starts)]
        counted = (
            (starts >= begin)
            & (ends <= aligned.size - (0 if data.endswith(END_OF_TURN) else LAST_BYTES))
            & (ends > starts)
        )
        return np.flatnonzero(counted & aligned.distributions.informed), ends

    def _find_cells(self, rows: Distributions, starts: Int[ndarray, "rows"], data: bytes) -> Int[ndarray, "entries"]:
        within = np.array([_count_typed_bytes(data, start) for start in starts.tolist()], np.int64)
        stream = np.frombuffer(b" " + data, np.uint8)
        row_starts = RowStarts(stream, starts.astype(np.int64) + 1, within + (within == 0), 0)
        # Where no text precedes, a space stands for it; the row is then split as its bytes alone are.
        split = continuation.spell_continuations(self._target, self._source, rows, row_starts)
        entry = np.repeat(np.arange(len(split.offsets) - 1), np.diff(split.offsets))
        ends = np.cumsum(self._lengths[np.maximum(split.tokens, 0)])
        ends -= np.append(0, ends)[split.offsets[entry]]
        first = np.repeat(row_starts.within, rows.counts)[entry]
        meets = np.bincount(entry[ends == first], minlength=len(rows.ids)) > 0
        after = np.bincount(entry[ends > first], minlength=len(rows.ids))
        relation = np.where(meets, np.where(after > 1, 1, 0), 2)
        return relation * len(KINDS) + self._kinds[rows.ids]


def _find_kept_tokens(
    trace: Trace, starts: Int[ndarray, "tokens"], ends: Int[ndarray, "tokens"]
) -> Bool[ndarray, "tokens"]:
    """Return for each target token whether the source kept all the tokens that spell it."""
    d = trace.distributions
    kept = np.zeros(len(d), bool)
    kept[d.rows[d.ids == trace.tokens[d.rows]]] = True
    missing = np.append(0, np.cumsum(~kept))
    first = np.searchsorted(trace.starts, starts, side="right") - 1
    last = np.searchsorted(trace.starts, ends, side="left")
    return missing[last] == missing[first.clip(0)]


def _append_gold(d: Distributions, tokens: Int[ndarray, "tokens"], chosen: Int[ndarray, "rows"]) -> Distributions:
    """Return the chosen rows, each with the token that came as one more entry at its end."""
    counts = d.counts[chosen]
    offsets = np.append(0, np.cumsum(counts + 1)).astype(np.int64)
    entries = np.repeat(d.offsets[chosen] - offsets[:-1], counts + 1) + np.arange(offsets[-1])
    is_gold = np.zeros(len(entries), bool)
    is_gold[offsets[1:] - 1] = True
    entries = entries.clip(max=len(d.ids) - 1)
    return Distributions(
        offsets=offsets,
        ids=np.where(is_gold, tokens[np.repeat(chosen, counts + 1)], d.ids[entries]).astype(np.int32),
        logprobs=np.where(is_gold, 0.0, d.logprobs[entries]).astype(np.float32),
        gold=d.gold[chosen],
        tail=d.tail[chosen],
    )


def _count_typed_bytes(data: bytes, end: int) -> int:
    """Count the bytes before `end` that belong to the word being typed and to the white space before it."""
    begin, least = end, max(end - MOST_TYPED_BYTES, 0)
    while begin > least and not data[begin - 1 : begin].isspace():
        begin -= 1
    while begin > least and data[begin - 1 : begin].isspace():
        begin -= 1
    return end - begin


def _classify_token(string: bytes | None) -> int:
    """Return the index in `KINDS` of the kind that most of a token's characters have."""
    if string == END_OF_TURN:
        return KINDS.index(ENDS)
    try:
        text = (string or b"").decode()
    except UnicodeDecodeError:
        return KINDS.index(PARTS)
    kinds = [span_losses.classify_character(c) for c in text]
    others = [k for k in kinds if k != span_losses.WHITE_SPACE] or kinds or [KINDS.index("other")]
    return max(others, key=others.count)


def summarize_conditionals(texts: Sequence[ConditionalCounts]) -> dict:
    """Return the conditional fidelity, and for each class its tokens, the mass that rows give them and their ratio.

    Classes are relations, kinds, and the relations within each domain; classes without a token are left out. `mass` and
    `came` are shares of all tokens or, in a domain's classes, of the domain's tokens. The interval of a ratio holds
    95 % of bootstrap resamples of texts, and its error is their standard deviation.

    `conditional_fidelity` says how far the worst class with `LEAST_TOKENS` tokens or more deviates for certain: it is
    the ratio, or its inverse where the mass is too large, at the end of its interval that is nearest to 1. It is 1 if
    every interval contains 1, and None if no class has that many tokens.
    """
    classes = {name: row for name, row in _compare_classes(texts).items() if row["tokens"]}
    judged = {name: _bound_ratio(row) for name, row in classes.items() if row["tokens"] >= LEAST_TOKENS}
    worst = min(judged, key=lambda name: judged[name], default=None)
    return {
        "conditional_fidelity": judged.get(worst),
        "worst_class": worst if worst and judged[worst] < 1 else None,
        "tokens": int(sum(text.observed.sum() for text in texts)),
        "texts": len(texts),
        "classes": classes,
    }


def _compare_classes(texts: Sequence[ConditionalCounts]) -> dict[str, dict[str, int | float | list[float]]]:
    predicted, observed = (np.array([getattr(t, name) for t in texts]) for name in ("predicted", "observed"))
    cells, everything = np.arange(CELLS), np.ones(len(texts), bool)
    relations = {name: cells[:-1] // len(KINDS) == n for n, name in enumerate(RELATIONS)}
    kinds = {name: cells[:-1] % len(KINDS) == n for n, name in enumerate(KINDS)}
    named = {name: np.append(of, False) for name, of in (relations | kinds).items()} | {BEYOND: cells == CELLS - 1}
    domains = np.array([text.domain for text in texts])
    result = {name: _compare(predicted, observed, everything, of) for name, of in named.items()}
    for domain in sorted(set(domains)):
        for name in RELATIONS:
            result[f"{domain}: {name}"] = _compare(predicted, observed, domains == domain, named[name])
    return result


def _compare(
    predicted: Float[ndarray, "texts cells"],
    observed: Int[ndarray, "texts cells"],
    texts: Bool[ndarray, "texts"],
    cells: Bool[ndarray, "cells"],
) -> dict[str, int | float | list[float]]:
    mass, came = predicted[texts][:, cells].sum(axis=1), observed[texts][:, cells].sum(axis=1)
    tokens = int(observed[texts].sum())
    drawn = np.random.default_rng(0).multinomial(len(came), np.full(len(came), 1 / len(came)), RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (drawn @ mass) / (drawn @ came)
    ratios = ratios[np.isfinite(ratios)] if came.sum() else np.zeros(1)
    return {
        "tokens": int(came.sum()),
        "came": float(came.sum() / max(tokens, 1)),
        "mass": float(mass.sum() / max(tokens, 1)),
        "ratio": float(mass.sum() / came.sum()) if came.sum() else 1.0,
        "error": float(ratios.std()),
        "interval": np.quantile(ratios, (0.025, 0.975)).tolist(),
    }


def _bound_ratio(row: Mapping) -> float:
    """Return the ratio, or its inverse if above 1, at the end of its interval that is nearest to 1."""
    low, high = row["interval"]
    return high if high < 1 else 1 / low if low > 1 else 1.0
