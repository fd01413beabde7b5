"""Compare fuse.py with the loops in reference.py, and check its identities."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import drawn
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fuselm.documents.corpus import Document
from fuselm.fusion import tails
from fuselm.fusion.choices import LEVELS
from fuselm.fusion.fuse import fuse, fuse_stores
from fuselm.fusion.weights import WEIGHT_FUNCTIONS, learn_weights
from fuselm.stores.distributions import Distributions, check_distributions
from fuselm.stores.store import Store, Trace, write_parts
from fuselm.system import manifest
from fuselm.system.progress import Progress

VOCAB, SIZE, WINDOW = 13, 17, 5
every_function = pytest.mark.parametrize("function", WEIGHT_FUNCTIONS)
every_level = pytest.mark.parametrize("level", tuple(LEVELS))
some = settings(max_examples=20)
fused_by = partial(fuse, vocabulary_size=VOCAB, window=WINDOW)


@st.composite
def sources(draw, *, least: int = 1, most: int = 5, silent: bool = True) -> list[Trace]:
    """Draw traces of the same tokens; `silent` ones have no information about some tokens."""
    count, tokens = draw(st.integers(least, most)), draw(st.integers(0, 7))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gold = random.integers(0, VOCAB, tokens)
    starts = np.sort(random.choice(SIZE, tokens, replace=False))
    return [_draw_trace(random, gold, starts, silent) for _ in range(count)]


def _draw_trace(random: np.random.Generator, gold: np.ndarray, starts: np.ndarray, silent: bool) -> Trace:
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


def compute_costs(traces: list[Trace], function: str, level: str) -> list[list[float | None]]:
    """Return by source and token the cost that `function` uses; None where a source has no information."""
    level = "token" if function == "oracle" else level
    spans = drawn.spans(traces[0].starts, SIZE)
    units = [1] * len(spans) if function == "entropy" else [end - begin for begin, end in spans]
    groups = {
        "document": [0] * len(spans),
        "window": [int(begin) // WINDOW for begin in traces[0].starts],
        "token": list(range(len(spans))),
    }
    out = []
    for trace in traces:
        d = trace.distributions
        known = d.informed.tolist()
        if function == "fixed" or (level == "document" and function != "entropy"):
            of_source = [trace.nats / SIZE if function != "fixed" else 0.0] * len(spans)
            out.append([cost if k else None for cost, k in zip(of_source, known, strict=True)])
            continue
        nats = (-d.gold.astype(np.float64)).tolist()
        if function == "entropy":
            rows = zip(drawn.rows_of(d), d.tail.tolist(), strict=True)
            nats = [reference.entropy(row, tail, VOCAB) for row, tail in rows]
        values = [n if k else None for n, k in zip(nats, known, strict=True)]
        out.append(reference.mean_over(values, units, groups[level]))
    return out


def compute_expected_weights(
    traces: list[Trace], function: str, level: str, prior: list[float], sharpness: float = 1.0, switch: float = 0.05
) -> list[list[float]]:
    known = np.stack([t.distributions.informed for t in traces], axis=1) & (np.array(prior) > 0)
    if function == "bayes":
        gold = np.stack([np.exp(t.distributions.gold.astype(np.float64)) for t in traces], axis=1)
        return reference.fixed_share_weights(gold.tolist(), known.tolist(), prior, switch)
    by_token = [
        [cost if may else None for cost, may in zip(of_token, allowed, strict=True)]
        for of_token, allowed in zip(
            zip(*compute_costs(traces, function, level), strict=True), known.tolist(), strict=True
        )
    ]
    if function in ("min_ce", "oracle"):
        return [reference.least_weights(of_token) for of_token in by_token]
    return [reference.softmax_weights(of_token, prior, sharpness) for of_token in by_token]


@every_function
@every_level
@some
@given(
    traces=sources(),
    prior=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=5, max_size=5),
    sharpness=st.sampled_from([0.0, 1.0, 7.0]),
    switch=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_fusion_equals_the_reference(function, level, traces, prior, sharpness, switch):
    prior = prior[: len(traces)]
    fused = fused_by(traces, function=function, level=level, prior=prior, sharpness=sharpness, switch=switch)
    weights = compute_expected_weights(traces, function, level, prior, sharpness, switch)
    np.testing.assert_allclose(fused.weights, np.reshape(weights, fused.weights.shape), rtol=1e-4, atol=1e-6)
    rows, tails = [drawn.rows_of(t.distributions) for t in traces], [t.distributions.tail.tolist() for t in traces]
    for i, (gold, exact) in enumerate(
        zip(fused.tokens.tolist(), fused.weights.astype(np.float64).tolist(), strict=True)
    ):
        of_token = [row[i] for row in rows]
        if function == "log_linear":
            row, tail, _ = reference.geometric_mean(of_token, [t[i] for t in tails], exact, gold, VOCAB)
        else:
            row, tail = reference.arithmetic_mean(of_token, exact, gold)
        made = drawn.row_of(*fused.distributions.row(i))
        assert made == pytest.approx(row, rel=1e-3, abs=1e-7)
        assert fused.distributions.tail[i] == pytest.approx(tail, abs=1e-5)
    check_distributions(fused.distributions, VOCAB)


@every_function
@every_level
@some
@given(traces=sources())
def test_gold_is_the_weighted_mean_whether_or_not_it_is_kept(function, level, traces):
    fused = fused_by(traces, function=function, level=level)
    gold = np.stack([t.distributions.gold.astype(np.float64) for t in traces], axis=1)
    uninformed = fused.weights.sum(axis=1) == 0
    expected = np.where(uninformed, 1.0, (fused.weights * np.exp(gold)).sum(axis=1))
    if function == "log_linear":
        rows, tails = [drawn.rows_of(t.distributions) for t in traces], [t.distributions.tail.tolist() for t in traces]
        weights = fused.weights.astype(np.float64).tolist()
        totals = [
            reference.geometric_mean([r[i] for r in rows], [t[i] for t in tails], weights[i], 0, VOCAB)[2]
            for i in range(len(weights))
        ]
        expected = np.where(uninformed, 1.0, np.exp((fused.weights * gold).sum(axis=1) - totals))
    np.testing.assert_allclose(np.exp(fused.distributions.gold), np.minimum(expected, 1), rtol=1e-4)
    assert (fused.distributions.gold <= 1e-7).all()


@every_function
@every_level
@some
@given(traces=sources())
def test_weights_of_a_token_sum_to_one_or_no_source_has_information(function, level, traces):
    fused = fused_by(traces, function=function, level=level)
    known = np.stack([t.distributions.informed for t in traces], axis=1)
    assert fused.weights.shape == known.shape
    np.testing.assert_allclose(fused.weights.sum(axis=1), known.any(axis=1), rtol=1e-6)
    assert not fused.weights[~known].any()


@every_function
@every_level
@some
@given(traces=sources(most=1))
def test_one_source_fuses_to_itself(function, level, traces):
    assert_like(fused_by(traces, function=function, level=level), traces[0])


@every_function
@every_level
@some
@given(traces=sources(most=1), copies=st.integers(2, 5))
def test_copies_of_a_source_fuse_to_that_source(function, level, traces, copies):
    assert_like(fused_by(traces * copies, function=function, level=level), traces[0])


@every_function
@every_level
@some
@given(traces=sources(least=2), random=st.randoms(use_true_random=False))
def test_the_order_of_sources_does_not_change_a_bit(function, level, traces, random):
    order = random.sample(range(len(traces)), len(traces))
    one = fused_by(traces, function=function, level=level)
    other = fused_by([traces[s] for s in order], function=function, level=level)
    assert np.array_equal(one.weights[:, order], other.weights)
    assert one.nats == other.nats
    for name in ("ids", "logprobs", "gold", "tail", "offsets"):
        assert np.array_equal(getattr(one.distributions, name), getattr(other.distributions, name)), name


@pytest.mark.parametrize(
    "function", sorted(set(WEIGHT_FUNCTIONS) - {"log_linear"})
)  # log_linear may be more certain than each of its sources
@some
@given(traces=sources(least=2))
def test_no_weights_give_a_text_a_greater_probability_than_the_oracle(function, traces):
    best = fused_by(traces, function="oracle").distributions.gold
    assert (fused_by(traces, function=function, level="token").distributions.gold <= best + 1e-6).all()


@pytest.mark.parametrize("function", ["entropy", "bayes", "fixed"])
@some
@given(traces=sources(least=2), changed=st.integers(1, 6))
def test_some_weights_do_not_depend_on_the_token_that_comes(function, traces, changed):
    """Change the probabilities of that token and of those after it; its weights stay."""
    if len(traces[0].tokens) <= changed:
        return
    others = []
    for n, trace in enumerate(traces):
        gold = trace.distributions.gold.copy()
        gold[changed:] = np.where(trace.distributions.informed[changed:], -1.0 - n, 0.0)
        others.append(replace(trace, distributions=replace(trace.distributions, gold=gold)))
    one, other = (fused_by(t, function=function, level="token").weights for t in (traces, others))
    assert np.array_equal(one[: changed + 1], other[: changed + 1])


def assert_like(fused: Trace, source: Trace) -> None:
    """Assert that both are equal, except where the source has no information: there the gold token has all the mass."""
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
def test_without_information_the_gold_token_gets_all_the_mass(function, level):
    fused = fused_by([single({}, 0.0)] * 2, function=function, level=level)
    assert drawn.rows_of(fused.distributions) == [{3: 1.0}]
    assert (fused.distributions.gold[0], fused.distributions.tail[0]) == (0.0, 0.0)
    assert fused.weights.tolist() == [[0.0, 0.0]]


@every_function
def test_a_source_without_information_has_no_weight_even_beside_one_that_excludes_the_gold_token(function):
    impossible = single({5: 0.75}, -math.inf)
    fused = fused_by([single({}, 0.0), impossible], function=function, level="token")
    assert fused.weights.tolist() == [[0.0, 1.0]]
    assert drawn.rows_of(fused.distributions) == [pytest.approx({5: 0.75})]
    assert fused.distributions.gold[0] == -math.inf


def test_min_ce_chooses_the_best_source_and_avg_ce_uses_both():
    good, bad = single({3: 0.25}, math.log(0.25), nats=17.0), single({4: 0.5}, math.log(0.5), nats=34.0)
    assert fused_by([bad, good], function="min_ce", level="document").weights.tolist() == [[0.0, 1.0]]
    assert fused_by([bad, good], function="min_ce", level="token").weights.tolist() == [[1.0, 0.0]]
    share = 1 / (1 + math.exp(-1))  # cross-entropies 2 and 1 nats a byte
    assert fused_by([bad, good], function="avg_ce", level="document").weights[0].tolist() == pytest.approx(
        [1 - share, share]
    )


def test_sources_aligned_to_different_tokens_are_refused():
    message = r"^document d: the sources are aligned to different tokens; align again$"
    for other in (single({3: 1.0}, 0.0, token=4), replace(single({3: 1.0}, 0.0), document="e")):
        with pytest.raises(ValueError, match=message):
            fused_by([single({3: 1.0}, 0.0), other])


@every_function
@every_level
def test_a_document_without_tokens_fuses_to_none(function, level):
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
    assert len(fused_by([trace, trace], function=function, level=level).distributions) == 0


def test_an_id_that_a_source_did_not_keep_gets_a_typical_probability_of_its_tail():
    """With probability 0 instead, the product of disjoint rows would have no mass."""
    fused = fused_by([single({3: 0.75}, math.log(0.75)), single({4: 0.75}, -2.0)], function="log_linear")
    row = drawn.rows_of(fused.distributions)[0]
    assert row.keys() == {3, 4} and row[3] == pytest.approx(row[4])
    assert sum(row.values()) + fused.distributions.tail[0] == pytest.approx(1)
    assert fused.distributions.tail[0] < 0.5


def test_bayes_begins_with_the_prior_and_follows_the_better_source():
    good, bad = (tokens_with_gold([math.log(p)] * 7) for p in (0.5, 0.125))
    weights = fused_by([good, bad], function="bayes", prior=[1.0, 3.0], switch=0.0).weights
    assert weights[0].tolist() == [0.25, 0.75]
    odds = [4**n / 3 for n in range(7)]
    np.testing.assert_allclose(weights[:, 0], [o / (1 + o) for o in odds], rtol=1e-6)
    steady = fused_by([good, bad], function="bayes", prior=[1.0, 3.0], switch=1.0).weights
    np.testing.assert_allclose(steady, [[0.25, 0.75]] * 7)


def tokens_with_gold(gold: list[float]) -> Trace:
    rows = [{3: math.exp(g)} for g in gold]
    return replace(
        single({3: 0.5}, 0.0),
        tokens=np.full(len(gold), 3, np.int32),
        starts=np.arange(len(gold), dtype=np.int32),
        distributions=drawn.distributions_of(rows, [1 - math.exp(g) for g in gold], gold),
        weights=np.zeros((len(gold), 0), np.float32),
    )


def test_learned_weights_give_the_text_the_greatest_probability():
    random = np.random.default_rng(0)
    gold = np.log(random.uniform(0.01, 0.9, (211, 3)))
    learned = learn_weights(gold, np.ones(gold.shape, bool), np.ones(3))
    best = np.log(np.exp(gold) @ learned).sum()
    for other in random.dirichlet(np.ones(3), 97):
        assert np.log(np.exp(gold) @ other).sum() <= best + 1e-4
    assert learned.sum() == pytest.approx(1)


def test_a_source_without_prior_or_information_keeps_its_weight():
    gold, everything = np.log(np.full((7, 2), 0.5)), np.ones((7, 2), bool)
    assert learn_weights(gold, everything, np.array([0.0, 2.0])).tolist() == [0.0, 1.0]
    assert learn_weights(gold, ~everything, np.array([1.0, 3.0])).tolist() == [0.25, 0.75]
    assert learn_weights(gold[:0], everything[:0], np.ones(2)).tolist() == [0.5, 0.5]
    np.testing.assert_allclose(learn_weights(gold, np.array([[True, False]] * 7), np.ones(2)), [0.5, 0.5])


@some
@given(traces=sources(), temperature=st.sampled_from([0.5, 2.0]))
def test_temperatures_are_applied_before_weights_are_computed(traces, temperature):
    changed = [
        replace(t, distributions=tails.apply_temperature(t.distributions, temperature, VOCAB), nats=math.nan)
        for t in traces
    ]
    one = fused_by(traces, function="avg_ce", level="token", temperatures=[temperature] * len(traces))
    other = fused_by(changed, function="avg_ce", level="token")
    assert np.array_equal(one.weights, other.weights)
    drawn.assert_same(one.distributions, drawn.rows_of(other.distributions), other.distributions.tail.tolist())
    before = sum(t.distributions.gold[np.isfinite(t.distributions.gold)].astype(float).sum() for t in traces)
    after = sum(t.distributions.gold[np.isfinite(t.distributions.gold)].astype(float).sum() for t in changed)
    each = [fused_by([t], function="min_ce", temperatures=[temperature]).nats - t.nats for t in traces]
    assert sum(each) == pytest.approx(before - after, abs=1e-3)


OPTIONS = {
    "vocabulary_size": VOCAB,
    "function": "fixed",
    "level": "token",
    "window": 256,
    "sharpness": 1.0,
    "switch": 0.05,
    "weights": {},
    "temperatures": {},
}


def write_stores(folder: Path, **documents: list[str]) -> dict[str, Store]:
    """Write each source's store of some documents; source a is better at English, source b at French."""
    opened = {}
    for source, names in documents.items():
        good = {"a": "en", "b": "fr"}[source]
        golds = {name: [math.log(0.75 if name.startswith(good) else 0.25)] * 3 for name in names}
        traces = [replace(tokens_with_gold(gold), document=name) for name, gold in golds.items()]
        manifest.build_once(
            folder / f"{source}-done", manifest.Recipe(stage="align"), lambda out, t=traces: write_parts(out, t)
        )
        opened[source] = Store(folder / f"{source}-done")
    return opened


def make_documents(*names: str) -> list[Document]:
    return [Document(id=n, origin=n, text="", domain=n[:2], split="train") for n in names]


def fuse_written(folder: Path, stores: dict[str, Store], *names: str, **options) -> dict:
    quiet = Progress(Console(quiet=True), "fuse")
    return fuse_stores(stores, make_documents(*names), folder, **(OPTIONS | options), progress=quiet)


def test_a_document_that_a_source_lacks_is_left_out_and_counted(tmp_path):
    stores = write_stores(tmp_path, a=["en1", "en2", "fr1"], b=["en2", "fr1"])
    counts = fuse_written(tmp_path, stores, "en1", "en2", "fr1", "fr9")
    assert (counts["documents"], counts["lacking"]) == (2, {"a": 0, "b": 1})


def test_weights_may_differ_by_source_and_domain(tmp_path):
    stores = write_stores(tmp_path, a=["en1", "fr1"], b=["en1", "fr1"])
    counts = fuse_written(tmp_path, stores, "en1", "fr1", weights={"a": {"fr": 0.0}, "b": 3.0})
    assert counts["shares"] == {"en": pytest.approx([0.25, 0.75]), "fr": [0.0, 1.0]}
    assert counts["weights"] == {"en": [1.0, 3.0], "fr": [0.0, 3.0]}


def test_learned_weights_find_the_best_source_of_each_domain(tmp_path):
    stores = write_stores(tmp_path, a=["en1", "fr1"], b=["en1", "fr1"])
    counts = fuse_written(tmp_path, stores, "en1", "fr1", weights="learned")
    np.testing.assert_allclose([counts["shares"]["en"], counts["shares"]["fr"]], [[1, 0], [0, 1]], atol=1e-3)
    rounded = 3 / 256 / math.log(2) / SIZE  # a store's gold is within 1/256 nat
    assert counts["bits_per_byte"]["en"] == pytest.approx(-3 * math.log2(0.75) / SIZE, abs=rounded)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": {"de": 2.0}}, "fuse.weights.a: no text is of domain 'de'; there are en, fr"),
        ({"a": 0.0, "b": {"fr": 0.0}}, "fuse.weights: no source has a part in domain 'fr'; give one a weight above 0"),
    ],
)
def test_impossible_weights_are_refused(tmp_path, weights, message):
    stores = write_stores(tmp_path, a=["en1", "fr1"], b=["en1", "fr1"])
    with pytest.raises(ValueError, match=f"^{message}$"):
        fuse_written(tmp_path, stores, "en1", "fr1", weights=weights)
