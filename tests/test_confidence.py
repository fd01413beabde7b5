"""confidence.py: bounds, ends, and what a token's weights become."""

import math

import drawn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fuselm import confidence

VOCAB = 13
logprobs = arrays.arrays(np.float64, 7, elements=st.floats(-50, 0) | st.just(-math.inf))


def test_a_row_that_is_sure_of_a_token_is_certain_and_one_that_has_no_idea_is_not():
    rows = [{3: 1.0}, {}, {i: 1 / VOCAB for i in range(VOCAB)}, {3: 0.5}]
    made = drawn.distributions_of(rows, [1 - sum(row.values()) for row in rows], [0.0] * len(rows))
    certain = confidence.certainty(made, VOCAB)
    assert certain[:3] == pytest.approx([1, 0, 0], abs=1e-4)
    assert 0 < certain[3] < 0.6


@given(fused=logprobs, own=logprobs)
def test_the_posterior_is_that_of_two_hypotheses_at_even_odds(fused, own):
    found = confidence.posterior(fused, own)
    for f, o, value in zip(np.exp(fused), np.exp(own), found, strict=True):
        assert value == pytest.approx(f / (f + o) if f + o else 0.5)
    np.testing.assert_allclose(found + confidence.posterior(own, fused), 1)


@given(given=arrays.arrays(np.float64, 5, elements=st.floats(0, 1)), lambda_clm=st.floats(0, 1))
def test_where_the_row_is_not_believed_the_text_alone_counts(given, lambda_clm):
    found = confidence.lambdas(given, lambda_clm)
    assert ((found >= lambda_clm - 1e-12) & (found <= 1)).all()
    assert confidence.lambdas(np.array([0.0, 1.0]), lambda_clm).tolist() == pytest.approx([1.0, lambda_clm])
