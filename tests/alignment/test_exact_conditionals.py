"""Compare aligned rows with exact conditionals, in vocabularies so small that every text can be listed.

Fidelity is 1 here, whatever rows say about the tokens that did not come, so it does not test them. The mean of a row
over all texts with the same past is compared with the exact conditional, because a target learns this mean.
"""

import functools

import enumeration
import numpy as np
import pytest

from fuselm.alignment.aligner import Aligner

AB, ABC, BC, CA = ("a", "b"), ("ab", "c"), ("b", "c"), ("c", "a")
PAIRS = {
    "same": ([AB, BC], [AB, BC]),
    "coarse to fine": ([AB, ABC, BC], [AB]),
    "fine to coarse": ([AB], [AB, ABC, BC, CA]),
    "letters to coarse": ([], [AB, ABC, BC, CA]),
    "crossing": ([AB, ("c", "c")], [BC, ("a", "a")]),
}
SETTLED = ("same", "coarse to fine")  # pairs where the source's rows determine the target's
LENGTH, BEFORE = 7, 4  # letters of a text; the end of the text splits tokens that begin after BEFORE
SEEDS = (0, 1, 2)


@functools.cache
def list_texts(pair: str, seed: int):
    """Return the source's and the target's vocabulary, and all texts split by each."""
    texts = enumeration.list_texts(enumeration.random_chain(seed), LENGTH)
    source, target = map(enumeration.vocabulary, PAIRS[pair])
    return source, target, enumeration.tokenize(source, texts), enumeration.tokenize(target, texts)


@functools.cache
def measure_distance(pair: str, seed: int, method: str) -> enumeration.Distance:
    source, target, of_source, of_target = list_texts(pair, seed)
    chain, random = enumeration.random_chain(seed), np.random.default_rng(0)
    texts = [chain.write(300, random) for _ in range(60)]  # not those that are aligned
    aligner = Aligner(source, target, method=method, texts=texts)
    return enumeration.measure(
        of_source, of_target, lambda trace, text: aligner.align(trace, text).distributions, BEFORE
    )


@functools.cache
def measure_bound(pair: str, seed: int, remembered: int = 0) -> enumeration.Distance:
    _, target, of_source, of_target = list_texts(pair, seed)
    return enumeration.bound(of_source, target, of_target, BEFORE, remembered=remembered)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_table_by_token_is_exact_only_if_the_source_determines_the_spelling(pair, seed):
    assert (measure_bound(pair, seed).variation < 1e-9) == (pair in SETTLED)
    assert measure_bound(pair, seed).variation < 0.07
    assert measure_bound(pair, seed, remembered=1).variation < 1e-9  # the chain looks back two letters


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_span_keeps_the_short_token_where_the_text_did_not_go(pair, seed):
    """Its rows are off by that, while its gold probabilities are exact; `branches` is closer."""
    found, least = measure_distance(pair, seed, "span"), measure_bound(pair, seed)
    if pair == "same":
        assert found.variation < 1e-6 and found.divergence < 1e-6
    else:
        assert least.variation + 0.02 < found.variation < 0.33 and least.divergence < found.divergence < 0.55
        assert measure_distance(pair, seed, "branches").variation < found.variation


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_mean_row_of_branches_is_about_as_close_as_a_table_allows(pair, seed):
    """The bound takes the row after a branch that was not taken as known; no store has it."""
    found, least = measure_distance(pair, seed, "branches"), measure_bound(pair, seed)
    assert found.variation <= least.variation + 0.025
    assert found.divergence <= least.divergence + 0.015


def test_documents_have_the_exact_rows_of_longer_texts():
    chain = enumeration.random_chain(0)
    source = enumeration.vocabulary([AB, ABC, BC, CA])
    listed_rows = enumeration.tokenize(source, enumeration.list_texts(chain, LENGTH)).rows
    for text, trace in enumeration.write_documents(chain, source, count=11, length=13):
        assert trace.size == len(text) and trace.tokens.tolist() == source.segment(text).ids.tolist()
        rows = enumeration.drawn.rows_of(trace.distributions)
        for i in (0, 1):
            exact = {t: p for t, p in listed_rows[tuple(trace.tokens[:i].tolist())].items() if p > 0}
            assert rows[i] == pytest.approx(exact, rel=1e-5)
