"""Check how attribution.py divides a change of probability among sources."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuselm.fusion.attribution import compute_shifts


@given(st.integers(0, 2**32 - 1), st.integers(0, 7), st.integers(1, 5))
def test_shifts_of_a_mixture_sum_to_what_it_moves(seed, tokens, sources):
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.ones(sources), tokens)
    gold, target = np.log(random.uniform(1e-6, 1, (tokens, sources))), np.log(random.uniform(1e-6, 1, tokens))
    mixed = (weights * np.exp(gold)).sum(axis=1)
    np.testing.assert_allclose(compute_shifts(weights, gold).sum(axis=1), mixed)
    np.testing.assert_allclose(compute_shifts(weights, gold, target).sum(axis=1), mixed - np.exp(target), atol=1e-12)


def test_the_heaviest_source_need_not_be_the_one_that_raises():
    shifts = compute_shifts(np.array([[0.9, 0.1]]), np.log(np.array([[0.001, 0.5]])), np.log(np.array([0.01])))
    assert shifts[0].tolist() == pytest.approx([0.9 * (0.001 - 0.01), 0.1 * (0.5 - 0.01)])


def test_a_source_without_weight_moves_nothing():
    impossible = compute_shifts(np.array([[0.0, 1.0]]), np.array([[-np.inf, 0.0]]), np.array([-np.inf]))
    assert impossible.tolist() == [[0.0, 1.0]]
