"""Intervals over seeds and documents: Student's quantiles, and how often they hold the true value."""

import math

import numpy as np
import pytest

from fuselm.results.seed_intervals import (
    adjust_for_comparisons,
    compute_student_p,
    compute_student_quantile,
    find_seed_interval,
)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1.0, 12.7062), (2.0, 4.30265), (4.0, 2.77645), (10.0, 2.22814), (100.0, 1.98397), (1e6, 1.95997)],
)
def test_quantiles_are_students(freedom, quantile):
    assert compute_student_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-4)
    assert compute_student_p(quantile, freedom) == pytest.approx(0.05, rel=1e-3)
    assert compute_student_p(0.0, freedom) == 1.0


def test_one_seed_has_the_interval_over_documents():
    found = find_seed_interval(-0.03, [-0.03], 0.01)
    assert (found.low, found.high) == pytest.approx((-0.03 - 1.95996 * 0.01, -0.03 + 1.95996 * 0.01), rel=1e-4)


def test_seeds_without_error_over_documents_have_students_interval():
    seeds = [-0.0374, -0.0355, -0.0278]
    found, mean = find_seed_interval(float(np.mean(seeds)), seeds, 0.0), np.mean(seeds)
    reach = 4.30265 * np.std(seeds, ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((mean - reach, mean + reach), rel=1e-4)


def test_seeds_that_agree_exactly_have_the_interval_over_documents():
    assert find_seed_interval(1.0, [1.0, 1.0, 1.0], 0.1) == find_seed_interval(1.0, [1.0], 0.1)
    assert find_seed_interval(0.0, [0.0, 0.0], 0.0).p == 1.0


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("between", [0.0, 1.0, 3.0])
def test_the_true_value_is_held_at_least_as_often_as_it_says(seeds, between):
    chance, held, times = np.random.default_rng(0), 0, 300
    for _ in range(times):
        effects = between * chance.normal(size=seeds)
        documents = chance.normal(size=40)  # the same documents for all seeds
        found = effects + documents.mean()
        interval = find_seed_interval(found.mean(), list(found), documents.std(ddof=1) / math.sqrt(40))
        held += interval.low <= 0 <= interval.high
    assert held / times > 0.915


def test_holms_method_adjusts_for_the_number_of_comparisons():
    adjusted = adjust_for_comparisons({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.9})
    assert adjust_for_comparisons({}) == {} and adjust_for_comparisons({"a": 0.02}) == {"a": 0.02}
