"""rounding.py: stored values are within the bounds of docs/store.md, and rows come back whole and in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuselm.stores import rounding

LOGPROBS = np.concatenate([np.linspace(-40, 0, 10_007), np.log(np.linspace(1e-9, 1, 10_007))]).astype(np.float32)


def test_rounded_entries_stay_within_the_stated_bound():
    exact, rounded = LOGPROBS.astype(np.float64), rounding.round_logprobs(LOGPROBS).astype(np.float64)
    large = np.exp(exact) >= 1 / 400
    assert np.abs(np.exp(rounded / 2) - np.exp(exact / 2))[large].max() <= 1 / 320 + 1e-6
    assert np.abs(rounded - exact)[~large].max() <= 1 / 8 + 1e-5
    assert len(np.unique(rounded[large])) <= 256 and rounded.max() == 0
    assert (np.diff(rounded[np.argsort(exact, kind="stable")]) >= 0).all()


@pytest.mark.parametrize(
    ("function", "values", "scale", "bound"),
    [
        (rounding.round_gold, LOGPROBS, lambda x: x, 1 / 256),
        (rounding.round_tail, np.append(0, np.linspace(1e-5, 1, 10_007)).astype(np.float32), np.sqrt, 1 / 512),
        (rounding.round_weights, np.linspace(0, 1, 10_007, dtype=np.float32), lambda x: x, 1 / 512),
    ],
)
def test_rounded_columns_stay_within_their_stated_bounds(function, values, scale, bound):
    rounded = function(values)
    assert rounded.dtype == np.float32
    assert np.abs(scale(rounded.astype(np.float64)) - scale(values.astype(np.float64))).max() <= bound + 1e-6


def test_certainty_and_impossibility_stay():
    assert rounding.round_gold(np.array([0, -np.inf], np.float32)).tolist() == [0, -np.inf]
    assert rounding.round_tail(np.array([0, 1e-9, 1], np.float32)).tolist() == [0, 1 / 256**2, 1]
    assert rounding.round_logprobs(np.array([0, -np.inf], np.float32)).tolist() == [0, -np.inf]


@given(st.lists(st.integers(0, 97), max_size=7), st.integers(0, 1 << 30))
def test_rows_come_back_whole_and_in_order(counts, seed):
    random = np.random.default_rng(seed)
    offsets = np.append(0, np.cumsum(counts)).astype(np.int64)
    rows = [random.dirichlet(np.full(count + 1, 0.3)).clip(1e-12) for count in counts]
    ids = np.concatenate([np.zeros(0), *(random.permutation(211)[:count] for count in counts)]).astype(np.int32)
    logprobs = np.log(np.concatenate([np.ones(0), *(row[1:] for row in rows)])).astype(np.float32)
    tail = np.array([row[0] for row in rows], np.float32)

    stored_ids, stored = rounding.sort_rows_by_id(offsets, ids, logprobs)
    back_ids, back, back_tail = rounding.restore_rows(offsets, stored_ids, rounding.round_logprobs(stored), tail)
    by_id, same_tail = rounding.normalise_rows(offsets, rounding.round_logprobs(stored), tail)
    assert same_tail.tolist() == back_tail.tolist()
    for row in range(len(counts)):
        at = slice(offsets[row], offsets[row + 1])
        whole = zip(back_ids[at], back[at], strict=True)
        assert dict(zip(stored_ids[at], by_id[at], strict=True)) == dict(whole), "but for their order"
        assert (np.diff(stored_ids[at]) > 0).all()
        assert (np.diff(back[at]) <= 0).all()
        assert dict(zip(stored_ids[at], stored[at], strict=True)) == dict(zip(ids[at], logprobs[at], strict=True))
        assert set(back_ids[at]) == set(ids[at])
        assert np.exp(back[at].astype(np.float64)).sum() + back_tail[row] == pytest.approx(1, abs=1e-5)
        exact = dict(zip(ids[at].tolist(), rows[row][1:], strict=True))
        error = [np.sqrt(np.exp(b)) - np.sqrt(exact[i]) for i, b in zip(back_ids[at].tolist(), back[at], strict=True)]
        assert np.abs(error).max(initial=0) < 0.02


def test_entries_round_to_the_grid_of_the_formula_to_the_bit():
    exact = LOGPROBS.astype(np.float64)
    roots = np.maximum(np.round(np.exp(exact / 2) * rounding.ROOTS), rounding.SMALLEST_ROOT)
    least = 2 * np.log(rounding.SMALLEST_ROOT / rounding.ROOTS)
    by_ratio = least + np.round((exact - least) * rounding.QUARTERS) / rounding.QUARTERS
    expected = np.where(exact >= least, 2 * np.log(roots / rounding.ROOTS), by_ratio).astype(np.float32)
    assert np.array_equal(rounding.round_logprobs(LOGPROBS), expected)
