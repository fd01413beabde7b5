"""fusion.py against the loops in reference.py, and its identities."""

import math
from dataclasses import replace

import drawn
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fuselm.distributions import Distributions, check
from fuselm.fusion import FUNCTIONS, LEVELS, fuse
from fuselm.store import Trace

VOCAB, SIZE = 13, 17
REFERENCE = {"min_ce": reference.fuse_min_ce, "avg_ce": reference.fuse_avg_ce}
every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_level = pytest.mark.parametrize("level", LEVELS)
some = settings(max_examples=60)


@st.composite
def sources(draw, *, least: int = 1, most: int = 5, silent: bool = True) -> list[Trace]:
    """Traces of the same tokens; `silent` ones say nothing of some tokens."""
    count, tokens = draw(st.integers(least, most)), draw(st.integers(0, 7))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gold = random.integers(0, VOCAB, tokens)
    starts = np.sort(random.choice(SIZE, tokens, replace=False))
    return [_one(random, gold, starts, silent) for _ in range(count)]


def _one(random: np.random.Generator, gold: np.ndarray, starts: np.ndarray, silent: bool) -> Trace:
    rows, tails, golds = [], [], []
    for token in gold.tolist():
        probabilities = random.dirichlet(np.full(VOCAB, 0.5)) + 1e-6
        probabilities /= probabilities.sum()
        ids = random.permutation(VOCAB)[: random.integers(1, VOCAB + 1)].tolist()
        known = not silent or random.random() < 0.7
        rows.append({i: float(probabilities[i]) for i in ids} if known else {})
        tails.append(max(1 - sum(rows[-1].values()), 0.0))
        golds.append(math.log(probabilities[token]) if known else 0.0)
    return Trace(
        document="d",
        size=SIZE,
        nats=float(random.choice([11.0, 12.5, 14.0])),
        tokens=gold.astype(np.int32),
        starts=starts.astype(np.int32),
        distributions=drawn.distributions_of(rows, tails, golds),
        weights=np.zeros((len(gold), 0), np.float32),
    )


def nats_per_byte(trace: Trace, level: str) -> list[float]:
    if level == "document":
        return [trace.nats / SIZE] * len(trace.tokens)
    spans = drawn.spans(trace.starts, trace.size)
    gold = trace.distributions.gold.astype(np.float64).tolist()
    return [-g / max(end - begin, 1) for (begin, end), g in zip(spans, gold, strict=True)]


@every_function
@every_level
@some
@given(traces=sources())
def test_fusion_equals_the_reference(function, level, traces):
    fused = fuse(traces, function=function, level=level)
    rows, costs = [drawn.rows_of(t.distributions) for t in traces], [nats_per_byte(t, level) for t in traces]
    expected = [
        REFERENCE[function]([r[i] for r in rows], [c[i] for c in costs], gold) for i, gold in enumerate(fused.tokens)
    ]
    drawn.assert_same(fused.distributions, [row for row, _, _ in expected], [tail for _, tail, _ in expected])
    weights = np.array([w for _, _, w in expected]).reshape(len(fused.tokens), len(traces))
    np.testing.assert_allclose(fused.weights, weights, rtol=1e-6)
    check(fused.distributions, VOCAB)


@every_function
@every_level
@some
@given(traces=sources())
def test_gold_is_the_weighted_mean_whether_or_not_kept(function, level, traces):
    fused = fuse(traces, function=function, level=level)
    gold = np.stack([np.exp(t.distributions.gold.astype(np.float64)) for t in traces], axis=1)
    nobody = fused.weights.sum(axis=1) == 0
    expected = np.where(nobody, 1.0, (fused.weights * gold).sum(axis=1))
    np.testing.assert_allclose(np.exp(fused.distributions.gold), expected, rtol=1e-5)
    assert (fused.distributions.gold <= 1e-7).all()


@every_function
@every_level
@some
@given(traces=sources())
def test_weights_of_a_token_sum_to_one_or_nobody_knows(function, level, traces):
    fused = fuse(traces, function=function, level=level)
    known = np.stack([t.distributions.informed for t in traces], axis=1)
    assert fused.weights.shape == known.shape
    np.testing.assert_allclose(fused.weights.sum(axis=1), known.any(axis=1), rtol=1e-6)
    assert not fused.weights[~known].any()


@every_function
@every_level
@some
@given(traces=sources(most=1))
def test_one_source_fuses_to_itself(function, level, traces):
    assert_like(fuse(traces, function=function, level=level), traces[0])


@every_function
@every_level
@some
@given(traces=sources(most=1), copies=st.integers(2, 5))
def test_copies_of_a_source_fuse_to_it(function, level, traces, copies):
    assert_like(fuse(traces * copies, function=function, level=level), traces[0])


@every_function
@every_level
@some
@given(traces=sources(least=2), random=st.randoms(use_true_random=False))
def test_the_order_of_sources_does_not_matter(function, level, traces, random):
    order = random.sample(range(len(traces)), len(traces))
    one = fuse(traces, function=function, level=level)
    other = fuse([traces[s] for s in order], function=function, level=level)
    np.testing.assert_allclose(one.weights[:, order], other.weights, rtol=1e-6)
    assert one.nats == other.nats
    drawn.assert_same(one.distributions, drawn.rows_of(other.distributions), other.distributions.tail.tolist())


def assert_like(fused: Trace, source: Trace) -> None:
    """The same, but for tokens of which the source says nothing: one-hot on the gold token, owed to nobody."""
    rows = [row or {int(t): 1.0} for row, t in zip(drawn.rows_of(source.distributions), source.tokens, strict=True)]
    known = source.distributions.informed
    drawn.assert_same(fused.distributions, rows, np.where(known, source.distributions.tail, 0.0).tolist())
    np.testing.assert_allclose(fused.distributions.gold, source.distributions.gold, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(fused.weights.sum(axis=1), known, rtol=1e-6)
    assert np.array_equal(fused.tokens, source.tokens) and np.array_equal(fused.starts, source.starts)
    assert (fused.document, fused.size, fused.nats) == (source.document, source.size, source.nats)


def single(row: reference.Row, gold: float, *, nats: float = 1.0, token: int = 3) -> Trace:
    tail = 1 - sum(row.values())
    return Trace(
        document="d",
        size=SIZE,
        nats=nats,
        tokens=np.array([token], np.int32),
        starts=np.zeros(1, np.int32),
        distributions=drawn.distributions_of([row], [tail], [gold]),
        weights=np.zeros((1, 0), np.float32),
    )


@every_function
@every_level
def test_where_nobody_knows_anything_the_gold_token_gets_all(function, level):
    fused = fuse([single({}, 0.0)] * 2, function=function, level=level)
    assert drawn.rows_of(fused.distributions) == [{3: 1.0}]
    assert (fused.distributions.gold[0], fused.distributions.tail[0]) == (0.0, 0.0)
    assert fused.weights.tolist() == [[0.0, 0.0]]


@every_function
def test_a_source_that_says_nothing_has_no_part_even_beside_one_that_rules_the_gold_token_out(function):
    impossible = single({5: 0.75}, -math.inf)
    fused = fuse([single({}, 0.0), impossible], function=function, level="token")
    assert fused.weights.tolist() == [[0.0, 1.0]]
    assert drawn.rows_of(fused.distributions) == [pytest.approx({5: 0.75})]
    assert fused.distributions.gold[0] == -math.inf


def test_min_ce_takes_the_best_source_of_the_document_and_avg_ce_both():
    good, bad = single({3: 0.25}, math.log(0.25), nats=17.0), single({4: 0.5}, math.log(0.5), nats=34.0)
    assert fuse([bad, good], function="min_ce", level="document").weights.tolist() == [[0.0, 1.0]]
    assert fuse([bad, good], function="min_ce", level="token").weights.tolist() == [[1.0, 0.0]]
    share = 1 / (1 + math.exp(-1))  # cross-entropies 2 and 1 nats a byte
    assert fuse([bad, good], function="avg_ce", level="document").weights[0].tolist() == pytest.approx(
        [1 - share, share]
    )


def test_sources_aligned_to_different_tokens_are_refused():
    message = r"^document d: the sources are aligned to different tokens; align again$"
    for other in (single({3: 1.0}, 0.0, token=4), replace(single({3: 1.0}, 0.0), document="e")):
        with pytest.raises(ValueError, match=message):
            fuse([single({3: 1.0}, 0.0), other])


def test_a_document_without_tokens_fuses_to_none():
    empty = Distributions(
        offsets=np.zeros(1, np.int64),
        ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        gold=np.zeros(0, np.float32),
        tail=np.zeros(0, np.float32),
    )
    trace = replace(
        single({}, 0.0),
        size=0,
        tokens=np.zeros(0, np.int32),
        starts=np.zeros(0, np.int32),
        distributions=empty,
        weights=np.zeros((0, 0), np.float32),
    )
    assert len(fuse([trace, trace]).distributions) == 0
