"""Check that conditionals.py finds exact rows right, and rows that favor short tokens wrong."""

import functools
from dataclasses import replace

import drawn
import enumeration
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuselm.alignment import conditionals
from fuselm.alignment.aligner import Aligner
from fuselm.alignment.conditionals import ConditionalCounter, ConditionalCounts, summarize_conditionals
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Trace

vocabularies = st.one_of(*drawn.kinds_of_vocabulary.values())
LETTERS, LONG = [], [("a", "b"), ("ab", "c"), ("b", "c"), ("c", "a")]


@functools.cache
def write_texts(seed: int) -> list[tuple[str, Trace, Trace]]:
    """Return texts of a chain, a source's traces of letters, and exact rows of a target with longer tokens."""
    source, target = enumeration.vocabulary(LETTERS), enumeration.vocabulary(LONG)
    chain = enumeration.random_chain(seed)
    return [
        (text, drawn.trace_of(source, text, np.random.default_rng(0)), aligned)
        for text, aligned in enumeration.write_documents(chain, target, count=61, length=101)
    ]


def count_tokens(seed: int, change=lambda trace: trace) -> list[ConditionalCounts]:
    counter = ConditionalCounter(enumeration.vocabulary(LETTERS), enumeration.vocabulary(LONG))
    return [counter.count(trace, change(aligned), text, domain="d") for text, trace, aligned in write_texts(seed)]


def halve_long_tokens(aligned: Trace) -> Trace:
    """Give half of the mass of each token of several letters to the first letter of the row's first entry."""
    d = aligned.distributions
    short, rows = enumeration.vocabulary(LONG).id_by_bytes, []
    for row in drawn.rows_of(d):
        long = {token: p for token, p in row.items() if token > short[b"c"]}
        changed = {token: p / 2 if token in long else p for token, p in row.items()}
        changed[short[b"a"]] = changed.get(short[b"a"], 0.0) + sum(long.values()) / 2
        rows.append(changed)
    return replace(aligned, distributions=drawn.distributions_of(rows, d.tail.tolist(), d.gold.tolist()))


@pytest.mark.parametrize("seed", [0, 1])
def test_exact_rows_give_every_class_the_mass_of_its_frequency(seed):
    result = summarize_conditionals(count_tokens(seed))
    assert result["conditional_fidelity"] > 0.98
    for row in result["classes"].values():
        if row["tokens"] >= conditionals.LEAST_TOKENS:
            assert row["ratio"] == pytest.approx(1, abs=0.06)
    assert result["classes"]["several_source_tokens"]["tokens"] >= conditionals.LEAST_TOKENS


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_favor_short_tokens_have_a_low_conditional_fidelity(seed):
    result = summarize_conditionals(count_tokens(seed, halve_long_tokens))
    several = result["classes"]["several_source_tokens"]
    assert several["ratio"] == pytest.approx(0.5, abs=0.05)
    assert several["interval"][0] < 0.5 + 0.05 and 0.45 < result["conditional_fidelity"] < 0.6


def test_a_one_hot_row_on_the_token_that_came_is_right_on_average():
    def one_hot(aligned: Trace) -> Trace:
        rows = [{token: 1.0} for token in aligned.tokens.tolist()]
        return replace(aligned, distributions=drawn.distributions_of(rows, [0.0] * len(rows), [0.0] * len(rows)))

    result = summarize_conditionals(count_tokens(0, one_hot))
    assert result["conditional_fidelity"] == 1 and result["worst_class"] is None


@given(vocabularies, vocabularies, st.text(drawn.ALPHABET, min_size=20, max_size=40), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_every_token_counts_one_as_predicted_and_one_as_observed(make_source, make_target, text, begin):
    source, target = make_source(), make_target()
    trace = drawn.trace_of(source, text, np.random.default_rng(7), top_k=3)
    aligned = Aligner(source, target, top_k=5, method="span").align(trace, text)
    found = ConditionalCounter(source, target).count(trace, aligned, text, domain="d", begin=begin)
    lengths = np.diff(np.append(aligned.starts, aligned.size))
    inside = (
        (aligned.starts >= begin) & (aligned.starts + lengths <= aligned.size - conditionals.LAST_BYTES) & (lengths > 0)
    )
    tokens = int((inside & aligned.distributions.informed).sum())
    assert found.observed.sum() == tokens and found.predicted.sum() == pytest.approx(tokens)
    assert (found.predicted >= -1e-6).all()


def test_a_relation_says_how_the_source_splits_the_typed_text_and_the_token():
    source, target = drawn.byte_pairs([(0, 1)]), drawn.byte_pairs([(1, 0)])  # ab; ba
    text = "abab a b" + " " * conditionals.LAST_BYTES
    aligned = Aligner(source, target, method="span").align(drawn.trace_of(source, text, np.random.default_rng(0)), text)
    assert target.spell(aligned.tokens.tolist())[:4] == [b"a", b"ba", b"b", b" "]
    rows = Distributions(
        offsets=np.array([0, 2, 3, 4]),
        ids=np.array(
            [target.id_by_bytes[b"a"], target.id_by_bytes[b"ba"], target.id_by_bytes[b"ba"], target.id_by_bytes[b"b"]],
            np.int32,
        ),
        logprobs=np.zeros(4, np.float32),
        gold=np.zeros(3, np.float32),
        tail=np.zeros(3, np.float32),
    )
    cells = ConditionalCounter(source, target)._find_cells(rows, np.array([0, 1, 3]), text.encode())
    assert [conditionals.RELATIONS[c // len(conditionals.KINDS)] for c in cells] == [
        "one_source_token",
        "several_source_tokens",
        "crossing_source_tokens",
        "crossing_source_tokens",
    ]
    assert {conditionals.KINDS[c % len(conditionals.KINDS)] for c in cells} == {"words"}


def test_without_text_there_is_no_conditional_fidelity():
    nothing = ConditionalCounts(
        domain="d", predicted=np.zeros(conditionals.CELLS), observed=np.zeros(conditionals.CELLS, np.int64)
    )
    assert summarize_conditionals([nothing])["conditional_fidelity"] is None
