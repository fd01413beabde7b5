"""Draw small random vocabularies of every kind, and random traces, for property tests."""

import itertools
import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import reference
from hypothesis import strategies as st
from numpy import ndarray
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as kinds

from fuselm.models.vocabulary import Segmentation, Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Trace

ALPHABET = "ab é"  # é is two bytes
FILLER_ROWS = 2  # of the output layer, more than the tokenizer has tokens


def byte_pairs(merges: list[tuple[int, int]], *, dummy_prefix: bool | None = None) -> Vocabulary:
    """Make a BPE over `ALPHABET` and these merges of earlier tokens.

    Byte-level if `dummy_prefix` is None; else as in SentencePiece with byte fallback, with or without a dummy prefix.
    """
    byte_level = dummy_prefix is None
    tokens = ["a", "b", "Ġ", "Ã", "©"] if byte_level else ["a", "b", "▁"]
    pairs = []
    for left, right in merges:
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if "".join(pair) not in tokens:
            pairs.append(pair)
            tokens.append("".join(pair))
    fallback = [] if byte_level else ["<0xC3>", "<0xA9>", "<0x61>"]  # <0x61> and a: two ids of the same bytes
    vocabulary = {token: i for i, token in enumerate(["<s>", *fallback, *tokens])}
    tokenizer = Tokenizer(kinds.BPE(vocab=vocabulary, merges=pairs, byte_fallback=not byte_level))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        prepended = [normalizers.Prepend("▁")] if dummy_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>"])
    return Vocabulary(tokenizer, tokenizer.get_vocab_size() + FILLER_ROWS)


def word_pieces(pieces: list[str], *, lower_case: bool = False) -> Vocabulary:
    """Make a WordPiece of the letters of `ALPHABET`, at the beginning of words and within, and these pieces."""
    letters = ["a", "b", "é"] if not lower_case else ["a", "b", "e"]
    tokens = ["[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    tokens += [piece for piece in dict.fromkeys(pieces) if piece not in tokens]
    tokenizer = Tokenizer(kinds.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    if lower_case:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]"])
    return Vocabulary(tokenizer, tokenizer.get_vocab_size() + FILLER_ROWS)


merges = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=7)
words = st.text("ab", min_size=2, max_size=3)
pieces = st.lists(words | words.map("##{}".format), max_size=5)
# Functions that make a vocabulary: made within a strategy, the type checker's use of `random` would disturb Hypothesis.
byte_level = merges.map(lambda drawn: partial(byte_pairs, drawn))
sentence_piece = st.tuples(merges, st.booleans()).map(
    lambda drawn: partial(byte_pairs, drawn[0], dummy_prefix=drawn[1])
)
word_piece = st.tuples(pieces, st.booleans()).map(lambda drawn: partial(word_pieces, drawn[0], lower_case=drawn[1]))
kinds_of_vocabulary = {"byte_level": byte_level, "sentence_piece": sentence_piece, "word_piece": word_piece}
texts = st.text(ALPHABET, max_size=11)
word_texts = st.lists(st.text("ab", min_size=1, max_size=3), max_size=4).map(" ".join)


def trace_of(
    vocabulary: Vocabulary, text: str, random: np.random.Generator, *, top_k: int | None = None, document: str = "d"
) -> Trace:
    """Draw distributions of a text's tokens, with `top_k` entries a row (all: no tail), whether or not gold."""
    segmentation = vocabulary.segment(text)
    tokens, size = len(segmentation.ids), vocabulary.size
    logits = random.normal(size=(tokens, size)) * 2
    logprobs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    k = size if top_k is None else min(top_k, size)
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(logprobs, ids, axis=1)
    gold = logprobs[np.arange(tokens), segmentation.ids]
    return trace(
        segmentation,
        Distributions(
            offsets=np.arange(tokens + 1) * k,
            ids=ids.ravel().astype(np.int32),
            logprobs=kept.ravel(),
            gold=gold,
            tail=np.zeros(tokens, np.float32)
            if top_k is None
            else np.clip(1 - np.exp(kept.astype(np.float64)).sum(axis=1), 0, 1).astype(np.float32),
        ),
        document=document,
    )


def trace(segmentation: Segmentation, distributions: Distributions, *, document: str = "d") -> Trace:
    return Trace(
        document=document,
        size=segmentation.size,
        nats=float(-distributions.gold.astype(np.float64).sum()),
        tokens=segmentation.ids,
        starts=segmentation.starts,
        distributions=distributions,
        weights=np.zeros((len(segmentation.ids), 0), np.float32),
    )


def distributions_of(rows: list[reference.Row], tails: list[float], gold: list[float]) -> Distributions:
    """Return the reference's rows and gold log-probabilities as distributions."""
    return Distributions(
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        ids=np.array([token for row in rows for token in row], np.int32),
        logprobs=np.array([math.log(p) for row in rows for p in row.values()], np.float32),
        gold=np.array(gold, np.float32),
        tail=np.array(tails, np.float32),
    )


def rows_of(distributions: Distributions) -> list[reference.Row]:
    return [row_of(*distributions.row(i)) for i in range(len(distributions))]


def row_of(ids: ndarray, logprobs: ndarray) -> reference.Row:
    return dict(zip(ids.tolist(), np.exp(logprobs.astype(np.float64)).tolist(), strict=True))


def spans(starts: ndarray, size: int) -> list[reference.Span]:
    """Return byte spans in a stream that has one byte, a space, before the text."""
    edges = [*(int(start) + 1 for start in starts), size + 1]
    return list(itertools.pairwise(edges))


def source_trace(trace: Trace) -> reference.SourceTrace:
    return reference.SourceTrace(
        spans=spans(trace.starts, trace.size),
        ids=trace.tokens.tolist(),
        gold_probabilities=np.exp(trace.distributions.gold.astype(np.float64)).tolist(),
        rows=rows_of(trace.distributions),
        tails=trace.distributions.tail.astype(np.float64).tolist(),
    )


def stretches(source, target) -> Iterator[tuple[slice, slice]]:
    """Yield source and target tokens of two segmentations of one text that spell the same stretch, token by token.

    A stretch begins where a token of each begins, or with the text, and ends before what either does not spell.
    """
    source_spans, target_spans = (spans(s.starts, s.size) for s in (source, target))
    first = None  # target token and source token that the stretch begins with
    for i, (begin, end) in enumerate([*target_spans, (0, 0)]):
        over = [j for j, (b, e) in enumerate(source_spans) if b < end and e > begin]
        good = i < len(target_spans) and target.spelled[i] and bool(source.spelled[over].all())
        if first and not good:
            until = target_spans[i - 1][1]
            yield slice(first[1], max(j for j, s in enumerate(source_spans) if s[0] < until) + 1), slice(first[0], i)
            first = None
        if good and not first:
            meets = [j for j, s in enumerate(source_spans) if s[0] == begin and source.spelled[j]]
            if i == 0 and source_spans and source.spelled[0]:
                meets = [0]
            first = (i, meets[0]) if meets else None


def take(trace: reference.SourceTrace, rows: slice) -> reference.SourceTrace:
    """Return some of the source's tokens by themselves."""
    return reference.SourceTrace(
        spans=trace.spans[rows],
        ids=trace.ids[rows],
        gold_probabilities=trace.gold_probabilities[rows],
        rows=trace.rows[rows],
        tails=trace.tails[rows],
    )


def assert_same(distributions: Distributions, rows: list[reference.Row], tails: list[float]) -> None:
    """Assert that rows are equal one by one, up to float32."""
    assert len(distributions) == len(rows)
    for i, (row, expected) in enumerate(zip(rows_of(distributions), rows, strict=True)):
        expected = {token: p for token, p in expected.items() if p > 0}
        assert row.keys() == expected.keys(), f"row {i}: {row} and not {expected}"
        np.testing.assert_allclose([row[t] for t in expected], list(expected.values()), rtol=1e-5, err_msg=f"row {i}")
    np.testing.assert_allclose(distributions.tail, tails, atol=3e-6)
