"""Cut a text into spans, the smallest runs of source and target tokens with shared ends, and measure their losses.

Every token is in one span, so the bits of spans sum to those of the text, both the source's own bits and the aligned
ones.
"""

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from fuselm.alignment import span, turns
from fuselm.alignment.aligner import Aligner
from fuselm.models.chat.messages import END_OF_TURN, Dialogue
from fuselm.models.segmentation import BITS_PER_UNSPELLED_BYTE
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Trace

BY_BYTES = ("span", "branches")  # methods that inform every token that both tokenizers spell
KINDS = ("one_to_one", "one_to_many", "many_to_one", "many_to_many")  # source tokens to target tokens
CATEGORIES = (
    "words",
    "digits",
    "punctuation",
    "CJK",
    "emoji",
    "other",
    "white_space",
    "unknown_tokens",
    "ends_of_turns",
)
END_CHARACTER = END_OF_TURN.decode("utf-8", "surrogateescape")
WHITE_SPACE, UNKNOWN = CATEGORIES.index("white_space"), CATEGORIES.index("unknown_tokens")
# Reasons why mass reaches no target id: `span.CAUSES`; in methods that pair tokens, an entry whose token has no partner
# or is beyond the largest `top_k`; and for positions without information, the reason why they have none.
SPLIT, UNPAIRED, UNSPELLED = "split_differently", "not_paired", "not_spelled"
CAUSES = (*(cause.replace(" ", "_") for cause in span.CAUSES), "maps_to_no_token", SPLIT, UNPAIRED, UNSPELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Hold one text as both tokenizers read it.

    Span k covers the bytes `edges[k]` to `edges[k+1]`. `own` holds the source's bits, 8 for each byte that it does not
    spell. `unspelled` counts the bytes that the source and the target do not spell.

    A token belongs to the span that it begins in. A token without text (several tokens of one character, made by a
    normalizer) belongs to the span of the byte before it, and a space that a tokenizer puts before the text to the
    first span.
    """

    text: str | Dialogue
    source_ids: Int[ndarray, "source_tokens"]
    source_starts: Int[ndarray, "source_tokens"]
    target_ids: Int[ndarray, "target_tokens"]
    target_starts: Int[ndarray, "target_tokens"]
    of_source: Int[ndarray, "source_tokens"]
    of_target: Int[ndarray, "target_tokens"]
    categories: Int[ndarray, "spans"]
    own: Float[ndarray, "spans"]
    unspelled: Int[ndarray, "2 spans"]
    edges: Int[ndarray, "spans+1"]

    @property
    def sizes(self) -> Int[ndarray, "spans"]:
        return np.diff(self.edges)

    @property
    def source_counts(self) -> Int[ndarray, "spans"]:
        return np.bincount(self.of_source, minlength=len(self.own))

    @property
    def target_counts(self) -> Int[ndarray, "spans"]:
        return np.bincount(self.of_target, minlength=len(self.own))

    @property
    def kinds(self) -> Int[ndarray, "spans"]:
        """Return each span's index in `KINDS`; a tokenizer that makes no token from a text counts as making one."""
        return (self.target_counts > 1) + 2 * (self.source_counts > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Hold how a text's spans were aligned; a span is informed if each of its target tokens with text is informed."""

    aligned: Float[ndarray, "spans"]  # bits; positions without information count 0
    informed: Bool[ndarray, "spans"]
    informed_tokens: Int[ndarray, "spans"]
    mass: Float[ndarray, "spans causes"]  # mass that reached no target id, summed over the span's target tokens


def cut_spans(source: Trace, target: Trace, text: str | Dialogue, vocabularies: tuple[Vocabulary, Vocabulary]) -> Spans:
    """Cut a text into spans, using its trace in the source's tokens and any trace in the target's tokens."""
    size = source.size
    edges = np.intersect1d(np.append(source.starts.clip(0), size), np.append(target.starts.clip(0), size))
    edges = np.unique(np.concatenate([edges, [0, size]])) if size else np.zeros(2, np.int64)
    of_source, of_target = (_find_spans(t.starts, size, edges) for t in (source, target))
    categories = _classify_spans(text, edges)
    for trace, span_of, vocabulary in zip((source, target), (of_source, of_target), vocabularies, strict=True):
        unknown = np.array([vocabulary.token_bytes[i] is None for i in trace.tokens], bool)
        categories[span_of[unknown]] = UNKNOWN
    unspelled = np.stack(
        [
            _count_unspelled(trace, span_of, vocabulary, text, len(edges) - 1)
            for trace, span_of, vocabulary in zip((source, target), (of_source, of_target), vocabularies, strict=True)
        ]
    )
    return Spans(
        text=text,
        source_ids=source.tokens,
        source_starts=source.starts,
        target_ids=target.tokens,
        target_starts=target.starts,
        of_source=of_source,
        of_target=of_target,
        categories=categories,
        own=_sum_bits(source, of_source, len(edges) - 1) + BITS_PER_UNSPELLED_BYTE * unspelled[0],
        unspelled=unspelled,
        edges=edges,
    )


def judge_spans(spans: Spans, aligned: Trace, mass: Float[ndarray, "tokens causes"]) -> Outcome:
    """Return how each span was aligned; `mass` comes from `compute_lost_mass`."""
    count = len(spans.own)
    with_text = aligned.lengths > 0
    gaps = with_text & ~aligned.distributions.informed
    tokens, missing = (np.bincount(spans.of_target[chosen], minlength=count) for chosen in (with_text, gaps))
    by_span = np.zeros((count, mass.shape[1]))
    np.add.at(by_span, spans.of_target, mass)
    return Outcome(
        aligned=_sum_bits(aligned, spans.of_target, count),
        informed=(missing == 0) & (tokens > 0),
        informed_tokens=np.bincount(spans.of_target[aligned.distributions.informed], minlength=count),
        mass=by_span,
    )


def compute_lost_bits(spans: Spans, outcome: Outcome) -> Float[ndarray, "spans"]:
    """Return the bits that the aligned distributions need beyond the source's; without information, all its bits.

    A span may need more because the span before it needed less: two words with the same beginning differ only later.
    """
    return np.where(outcome.informed, outcome.aligned - spans.own, spans.own)


def compute_lost_mass(
    aligner: Aligner, method: str, spans: Spans, source: Trace, aligned: Trace
) -> Float[ndarray, "tokens causes"]:
    """Return the mass of each target position that reached no id, by `CAUSES`; a row sums to its tail.

    `span` reports this mass itself. `branches` leaves out what it does not know, so its rows lack only the source's
    tail and what was cut. A method that pairs tokens loses the entries that map to nothing and the tail of
    the source's row, which is here the row of the token that covers the position's first byte.
    """
    d = aligned.distributions
    result = np.zeros((len(d), len(CAUSES)))
    tails = d.tail.astype(np.float64)
    if aligned.tokens is source.tokens:  # with one vocabulary, rows are the source's own or cleared
        result[:, 0] = tails
    elif method == "span":
        segmentation = aligner.target.segment(spans.text)
        for turn in turns.pair_turns(aligner.source, aligner.target, source, segmentation, spans.text.encode()):
            _, causes = span.follow_text(
                aligner.source, aligner.target, aligner.spelling, turn.trace, turn.target, turn.data, aligner.top_k
            )
            result[turn.tokens, : len(span.CAUSES)] = causes
    elif method == "branches":
        result[:, 0] = tails
    elif len(source.tokens):
        rows = np.searchsorted(source.starts, aligned.starts.clip(0), side="right") - 1
        beyond = source.distributions.tail.astype(np.float64) - _find_unkept_gold_mass(source)
        result[:, 0] = np.minimum(beyond.clip(0)[rows.clip(0)], tails)
        result[:, CAUSES.index("maps_to_no_token")] = tails - result[:, 0]
    result[~d.informed] = 0.0
    lacking = ~d.informed & ((method in BY_BYTES) | spans.unspelled.any(axis=0)[spans.of_target])
    result[lacking, CAUSES.index(UNSPELLED)] = 1.0
    is_one_to_one = spans.kinds[spans.of_target] == 0
    result[~d.informed & ~lacking & is_one_to_one, CAUSES.index(UNPAIRED)] = 1.0
    result[~d.informed & ~lacking & ~is_one_to_one, CAUSES.index(SPLIT)] = 1.0
    return result


def summarize_kinds(texts: Sequence[Spans]) -> dict[str, dict[str, int | float]]:
    """Count the spans of each kind, with their shares of the target's tokens and of the bytes."""
    kinds, tokens, sizes = (_join(texts, name) for name in ("kinds", "target_counts", "sizes"))
    return {
        name: {
            "spans": int((kinds == k).sum()),
            "target_tokens": _divide(tokens[kinds == k], tokens),
            "bytes": _divide(sizes[kinds == k], sizes),
        }
        for k, name in enumerate(KINDS)
    }


def summarize_categories(texts: Sequence[Spans], outcomes: Sequence[Outcome]) -> dict[str, dict[str, int | float]]:
    """Return bytes, bits, coverage and fidelity of each category that occurs.

    `fidelity` counts only informed spans, and `own_bits_informed` is the share of the source's bits in them.
    """
    categories, kinds, sizes, own = (_join(texts, name) for name in ("categories", "kinds", "sizes", "own"))
    tokens, found = _join(texts, "target_counts"), _join(outcomes, "informed_tokens")
    informed, aligned = _join(outcomes, "informed"), _join(outcomes, "aligned")
    result = {}
    for c, name in enumerate(CATEGORIES):
        chosen = categories == c
        if chosen.any():
            result[name] = {
                "spans": int(chosen.sum()),
                "bytes": _divide(sizes[chosen], sizes),
                "one_to_one": _divide(sizes[chosen & (kinds == 0)], sizes[chosen]),
                "own_bits_per_byte": float(own[chosen].sum() / max(sizes[chosen].sum(), 1)),
                "coverage": _divide(found[chosen], tokens[chosen]),
                "own_bits_informed": _divide(own[chosen & informed], own[chosen]),
                "fidelity": _divide(aligned[chosen & informed], own[chosen & informed]),
            }
    return result


def summarize_causes(texts: Sequence[Spans], outcomes: Sequence[Outcome]) -> dict[str, dict[str, int | float]]:
    """Return the mass and the bits that are lost, by cause.

    `mass` is the mean, over all target positions, of the mass that reached no id. `bits` is the source's bits in spans
    without information, as shares of all its bits.
    """
    kinds, own, informed = _join(texts, "kinds"), _join(texts, "own"), _join(outcomes, "informed")
    spelled = np.concatenate([~text.unspelled.any(axis=0) for text in texts])
    mass = _join(outcomes, "mass").sum(axis=0) / max(int(_join(texts, "target_counts").sum()), 1)
    causes = {
        "mass": dict(zip(CAUSES, mass.tolist(), strict=True)),
        "bits": {
            SPLIT: _divide(own[~informed & spelled & (kinds > 0)], own),
            UNPAIRED: _divide(own[~informed & spelled & (kinds == 0)], own),
            UNSPELLED: _divide(own[~informed & ~spelled], own),
        },
    }
    return {unit: {c: v for c, v in lost.items() if c != UNSPELLED or v} for unit, lost in causes.items()}


def compute_unspelled_shares(texts: Sequence[Spans]) -> dict[str, float]:
    """Return the shares of bytes that the source and the target do not spell, or nothing if both spell all."""
    source, target = np.sum([text.unspelled.sum(axis=1) for text in texts], axis=0).tolist()
    size = max(int(_join(texts, "sizes").sum()), 1)
    return {"source": source / size, "target": target / size} if source or target else {}


def summarize_informed(texts: Sequence[Spans], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the informed spans' shares of the bytes and of the source's bits, and the fidelity within them."""
    sizes, own = _join(texts, "sizes"), _join(texts, "own")
    chosen, aligned = _join(outcomes, "informed"), _join(outcomes, "aligned")
    return {
        "bytes": _divide(sizes[chosen], sizes),
        "own_bits": _divide(own[chosen], own),
        "fidelity": _divide(aligned[chosen], own[chosen]),
    }


def _join(parts: Sequence[Spans] | Sequence[Outcome], name: str) -> ndarray:
    """Join one array of all texts."""
    return np.concatenate([getattr(part, name) for part in parts])


def _divide(part: ndarray, whole: ndarray) -> float:
    """Return the ratio of two sums, or 1 if the second is 0."""
    return float(part.sum() / whole.sum()) if whole.sum() else 1.0


def _find_spans(starts: Int[ndarray, "tokens"], size: int, edges: Int[ndarray, "edges"]) -> Int[ndarray, "tokens"]:
    """Return for each token the span that it belongs to."""
    starts = starts.clip(0).astype(np.int64)
    empty = np.append(starts[1:], size)[: len(starts)] == starts
    place = np.where(empty, starts - 1, starts).clip(0)
    return (np.searchsorted(edges, place, side="right") - 1).clip(0, len(edges) - 2)


def _sum_bits(trace: Trace, span_of: Int[ndarray, "tokens"], count: int) -> Float[ndarray, "spans"]:
    """Sum the bits of each span's tokens; `span_of` has each token's span."""
    nats = -trace.distributions.gold.astype(np.float64)
    return np.bincount(span_of, weights=nats, minlength=count) / np.log(2)


def _count_unspelled(
    trace: Trace, span_of: Int[ndarray, "tokens"], vocabulary: Vocabulary, text: str | Dialogue, count: int
) -> Int[ndarray, "spans"]:
    """Count the bytes that each span's tokens do not spell; without tokens, the first span has all bytes."""
    if not len(trace.tokens):
        return np.bincount([0], weights=[trace.size], minlength=max(count, 1)).astype(np.int64)[:count]
    lengths = trace.lengths
    lengths[vocabulary.find_spelled(trace.tokens, trace.starts, text)] = 0
    return np.bincount(span_of, weights=lengths, minlength=count).astype(np.int64)


def _find_unkept_gold_mass(trace: Trace) -> Float[ndarray, "tokens"]:
    """Return the gold token's probability where it is not among the entries, and 0 elsewhere."""
    d = trace.distributions
    outside = np.ones(len(d), bool)
    outside[d.rows[d.ids == trace.tokens[d.rows]]] = False
    return np.where(outside, np.exp(d.gold.astype(np.float64)), 0.0)


def _classify_spans(text: str | Dialogue, edges: Int[ndarray, "edges"]) -> Int[ndarray, "spans"]:
    """Return each span's most frequent category by bytes; white space counts only where nothing else is."""
    shown = text.encode().decode("utf-8", "surrogateescape")  # the end of a turn is no UTF-8
    category_of_byte = np.repeat(
        np.fromiter(map(classify_character, shown), np.int64, len(shown)),
        np.fromiter((len(c.encode("utf-8", "surrogateescape")) for c in shown), np.int64, len(shown)),
    )
    count = len(edges) - 1
    span_of_byte = np.repeat(np.arange(count), np.diff(edges))
    votes = np.bincount(span_of_byte * len(CATEGORIES) + category_of_byte, minlength=count * len(CATEGORIES))
    votes = votes.reshape(count, len(CATEGORIES))
    votes[:, WHITE_SPACE] = votes[:, WHITE_SPACE].clip(max=votes.sum(axis=1) == votes[:, WHITE_SPACE])
    return votes.argmax(axis=1)


_CJK = ((0x1100, 0x11FF), (0x2E80, 0x9FFF), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0xFF00, 0xFFEF))


@functools.cache
def classify_character(character: str) -> int:
    """Return the index in `CATEGORIES` of a character."""
    code, kind = ord(character), unicodedata.category(character)
    if character == END_CHARACTER:
        name = "ends_of_turns"
    elif character.isspace():
        name = "white_space"
    elif any(low <= code <= high for low, high in _CJK) or 0x20000 <= code <= 0x3FFFF:
        name = "CJK"
    elif (
        (code >= 0x1F000 and kind[0] == "S") or (0x2600 <= code <= 0x27BF and kind == "So") or code in (0xFE0F, 0x200D)
    ):
        name = "emoji"
    else:
        name = {"L": "words", "M": "words", "N": "digits", "P": "punctuation", "S": "punctuation"}.get(kind[0], "other")
    return CATEGORIES.index(name)
