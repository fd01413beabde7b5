"""distributions.py: masses add up, the tail is what is missing, and an impossible distribution is refused."""

import math
from dataclasses import replace

import drawn
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from fuselm.stores.distributions import Distributions, check_distributions

VOCAB = 11


def of_masses(masses: list[tuple[int, int, float]], gold: list[int], *, top_k: int = VOCAB, informed=None):
    rows, ids, values = zip(*masses, strict=True) if masses else ((), (), ())
    return Distributions.from_masses(
        np.array(rows, np.int64),
        np.array(ids, np.int64),
        np.array(values, np.float64),
        np.array(gold, np.int64),
        np.ones(len(gold), bool) if informed is None else np.array(informed, bool),
        top_k,
    )


@st.composite
def some_masses(draw):
    tokens = draw(st.integers(0, 5))
    cell = st.tuples(st.integers(0, max(tokens - 1, 0)), st.integers(0, VOCAB - 1), st.floats(0.01, 1))
    masses = draw(st.lists(cell, max_size=23 if tokens else 0))
    sums = np.bincount([r for r, _, _ in masses], [m for _, _, m in masses], minlength=tokens) * draw(st.floats(1, 2))
    gold = draw(st.lists(st.integers(0, VOCAB - 1), min_size=tokens, max_size=tokens))
    return [(r, i, m / sums[r]) for r, i, m in masses], gold


@given(some_masses(), st.integers(1, VOCAB))
def test_masses_add_up_and_the_largest_are_kept(drawn_masses, top_k):
    masses, gold = drawn_masses
    distributions = of_masses(masses, gold, top_k=top_k)
    check_distributions(distributions, VOCAB)
    assert len(distributions) == len(gold)
    for i, row in enumerate(drawn.rows_of(distributions)):
        whole: reference.Row = {}
        for r, token, mass in masses:
            if r == i:
                whole[token] = whole.get(token, 0.0) + mass
        assert sorted(row.values(), reverse=True) == list(row.values())
        assert list(row.values()) == pytest.approx(sorted(whole.values(), reverse=True)[:top_k])
        assert all(whole[token] == pytest.approx(p) for token, p in row.items())
        assert math.exp(distributions.gold[i]) == pytest.approx(whole.get(gold[i], 0.0), abs=1e-7)
        assert distributions.tail[i] == pytest.approx(1 - sum(row.values()), abs=1e-6)


def test_gold_is_recorded_whether_or_not_its_entry_is_kept():
    distributions = of_masses([(0, 3, 0.5), (0, 7, 0.25), (0, 2, 0.125)], [2], top_k=2)
    assert drawn.rows_of(distributions) == [pytest.approx({3: 0.5, 7: 0.25})]
    assert math.exp(distributions.gold[0]) == pytest.approx(0.125)
    assert distributions.tail[0] == pytest.approx(0.25)


def test_gold_without_mass_is_impossible_and_without_information_is_zero():
    distributions = of_masses([(0, 3, 1.0)], [5, 5], informed=[True, False])
    assert distributions.gold.tolist() == [-math.inf, 0.0]
    assert distributions.informed.tolist() == [True, False]
    assert distributions.tail.tolist() == [0.0, 1.0]


def test_equal_masses_are_kept_by_lowest_id():
    distributions = of_masses([(0, i, 0.1) for i in (7, 2, 5, 3)], [0], top_k=2)
    assert distributions.ids.tolist() == [2, 3]


def test_no_masses_and_no_tokens():
    assert len(of_masses([], [])) == 0
    nothing = of_masses([], [1, 2, 3])
    assert (nothing.counts.tolist(), nothing.tail.tolist()) == ([0, 0, 0], [1, 1, 1])
    check_distributions(nothing, VOCAB)


def test_each_entry_knows_the_number_of_its_row():
    distributions = of_masses([(0, 1, 0.5), (2, 3, 0.25), (2, 4, 0.5)], [1, 1, 1])
    assert distributions.rows.tolist() == [0, 2, 2]
    assert [ids.tolist() for ids, _ in map(distributions.row, range(3))] == [[1], [], [4, 3]]


@pytest.fixture
def fine() -> Distributions:
    return of_masses([(0, 1, 0.5), (1, 2, 0.75)], [1, 2])


@pytest.mark.parametrize("column", ["logprobs", "gold", "tail"])
def test_nan_is_found(column, fine):
    values = getattr(fine, column).copy()
    values[1] = np.nan
    with pytest.raises(ValueError, match=r"^row 1: the distribution holds NaN$"):
        check_distributions(replace(fine, **{column: values}), VOCAB)


def test_a_sum_above_one_is_found(fine):
    with pytest.raises(ValueError, match=r"^row 1: entries and tail sum to 1\.1500, not 1$"):
        check_distributions(replace(fine, tail=fine.tail + np.array([0, 0.15], np.float32)), VOCAB)


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_an_id_outside_the_vocabulary_is_found(bad, fine):
    with pytest.raises(ValueError, match=rf"^id {bad} is outside the vocabulary of {VOCAB}$"):
        check_distributions(replace(fine, ids=np.array([1, bad], np.int32)), VOCAB)
